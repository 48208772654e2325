"""Predict a job from its pilot: tokens from lengths, time from steps, energy from power; intervals by bootstrap."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from jobs.reports.pilot.lengths import JobLengths, OpenRequest, PilotRequest, size_bounds, texts_by_group
from jobs.reports.pilot.step_times import MeasuredStep, StepCurve, decode_ms, pace_blocks

LEVEL: Final = 0.9  # probability that an interval holds the truth, if the machine stays as it is
_ROUNDS: Final = 200  # of the bootstrap
_MAX_SIMULATED: Final = 5_000  # texts; the time of a longer job is in proportion to it


@dataclass(frozen=True, slots=True)
class Interval:
    """A prediction, and the range that holds the truth with probability LEVEL."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Pilot:
    """What a pilot has measured, and what is left of its job."""

    requests: Sequence[PilotRequest]  # that completed
    steps: Sequence[MeasuredStep]  # in order
    rest: Sequence[OpenRequest]
    slots: int  # texts of the job that one worker decodes at once
    workers: int = 1  # that serve the model
    rows_ms: Mapping[int, float] | None = None  # calibrated ms of a step by its rows
    rows_per_sequence: float = 1.0  # draft nodes included
    power_w: float | None = None  # of one worker; None: neither measured nor configured


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the rest of the job takes. None: it can't be predicted."""

    prompt_tokens: Interval
    completion_tokens: Interval
    seconds: Interval | None
    joules: Interval | None


def estimate(pilot: Pilot, seed: int = 0) -> Estimate | None:
    """Return the prediction; None without a completed request. The same pilot and seed give the same numbers."""
    if not pilot.requests:
        return None
    draws = random.Random(seed)
    bounds = size_bounds(pilot.requests)
    fitted = JobLengths(pilot.requests, bounds)
    counts, size = texts_by_group(pilot.rest, fitted), sum(request.size for request in pilot.rest)

    def totals(lengths: JobLengths) -> tuple[float, float]:
        return lengths.totals(counts, len(pilot.rest), size)

    prompt, completion = totals(fitted)
    rounds = [totals(JobLengths(_resampled(pilot.requests, draws), bounds)) for _ in range(_ROUNDS)]
    seconds = _seconds(pilot, fitted, prompt, completion, [tokens for _, tokens in rounds], draws)
    joules = None
    if seconds is not None and pilot.power_w is not None:
        watts = pilot.power_w * pilot.workers
        joules = Interval(seconds.estimate * watts, seconds.low * watts, seconds.high * watts)
    return Estimate(
        _interval(prompt, [tokens for tokens, _ in rounds]),
        _interval(completion, [tokens for _, tokens in rounds]),
        seconds,
        joules,
    )


def _seconds(
    pilot: Pilot,
    lengths: JobLengths,
    prompt: float,
    completion: float,
    rounds: Sequence[float],
    draws: random.Random,
) -> Interval | None:
    if not any(step.emitted for step in pilot.steps):
        return None
    curve = StepCurve(pilot.steps, pilot.rows_ms or {}, pilot.rows_per_sequence)
    blocks = pace_blocks(pilot.steps, curve)
    pace = sum(measured for measured, _ in blocks) / sum(predicted for _, predicted in blocks)
    texts = _texts(pilot, lengths, draws)
    scale = _scale(completion / pilot.workers, texts)
    seconds = pace * scale * decode_ms(texts, prompt / pilot.workers / scale, pilot.slots, curve) / 1e3
    tried = []
    for tokens in rounds:
        chosen = draws.choices(blocks, k=len(blocks))
        factor = sum(measured for measured, _ in chosen) / sum(predicted for _, predicted in chosen) / pace
        tried.append(seconds * factor * (tokens / completion if completion else 1.0))
    return _interval(seconds, tried)


def _texts(pilot: Pilot, lengths: JobLengths, draws: random.Random) -> list[int]:
    """Return drawn lengths of the texts that one worker decodes, in order."""
    found: list[int] = []
    for request in pilot.rest[:: pilot.workers]:
        curve = lengths.curve(request)
        found += [max(1, curve.quantile(draws.random(), request.max_tokens)) for _ in range(request.texts)]
        if len(found) >= _MAX_SIMULATED:
            break
    return found


def _scale(completion: float, texts: Sequence[int]) -> float:
    """Return how much more than the drawn texts there is to decode."""
    drawn = sum(texts)
    return completion / drawn if drawn else 1.0


def _resampled(requests: Sequence[PilotRequest], draws: random.Random) -> list[PilotRequest]:
    return draws.choices(requests, k=len(requests))


def _interval(estimate: float, tried: Sequence[float]) -> Interval:
    ordered = sorted(tried)
    tail = (1 - LEVEL) / 2
    low, high = ordered[int(tail * len(ordered))], ordered[-1 - int(tail * len(ordered))]
    return Interval(estimate, min(low, estimate), max(high, estimate))
