"""Predict a job from its pilot: tokens from lengths, time from steps, energy from power; intervals by bootstrap.

An interval holds what the pilot shows (its draw, the spread of lengths, the pace of blocks of steps) and what it can't
show: texts unlike any of it, the growth of a step beyond its largest batch, and a load that changes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from typing import Final

from jobs.reports.pilot.lengths import JobLengths, OpenRequest, PilotRequest, size_bounds, texts_by_group, unseen
from jobs.reports.pilot.step_times import MeasuredStep, StepCurve, decode_ms, pace

LEVEL: Final = 0.9  # probability that an interval holds the truth
_ROUNDS: Final = 200  # of the bootstrap
_MAX_SIMULATED: Final = 5_000  # texts; the time of a longer job is in proportion to it
# What a pilot can't show, from the eleven jobs of docs/measurements/2026-11-30-estimates.md:
_GROWTH: Final = (
    1.25  # power of the calibrated growth of a step beyond the pilot's largest batch: one standard deviation
)
_LOAD: Final = 0.08  # standard deviation of the pace of the machine between the pilot and the rest, at least
_LEAST_FOUND: Final = 0.5  # of the prompts that repeat: in memory when they come again, and not computed


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
    limits = sorted({limit for _, limit in counts}, key=lambda limit: limit or 0) or [None]

    def totals(lengths: JobLengths) -> tuple[float, float]:
        return lengths.totals(counts, len(pilot.rest), size)

    prompt, completion = totals(fitted)
    spread = fitted.spread(texts_by_group(pilot.rest, fitted, power=2))
    most = sum(texts * limit for (_, limit), texts in counts.items() if limit) if None not in limits else float("inf")
    rounds = []
    for _ in range(_ROUNDS):
        seen = draws.choices(pilot.requests, k=len(pilot.requests))
        prompts, tokens = totals(JobLengths([*seen, *unseen(pilot.requests, limits, draws)], bounds))
        rounds.append((prompts, min(max(0.0, tokens + spread * draws.gauss(0.0, 1.0)), most)))
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
    """Return the time of the rest; `rounds` are totals of completion tokens that may come."""
    if not any(step.emitted for step in pilot.steps):
        return None
    texts = _texts(pilot, lengths, draws)
    scale = completion / pilot.workers / sum(texts) if texts else 1.0  # how much more than the drawn texts there is
    curve, less, more = (
        StepCurve(pilot.steps, pilot.rows_ms or {}, pilot.rows_per_sequence, growth)
        for growth in (1.0, 1 / _GROWTH, _GROWTH)
    )
    ratio, error = pace(pilot.steps, curve)
    decode, slow_growth, fast_growth = (scale * decode_ms(texts, pilot.slots, one) / 1e3 for one in (curve, less, more))
    prefill = prompt / pilot.workers * curve.prefill_ms / 1e3
    repeated = _repeated(pilot.rest)
    seconds = ratio * (decode + prefill * (1 - repeated))
    ran = sum(step.ms for step in pilot.steps) / 1e3
    of_load = (
        sqrt((_LOAD**2 + error**2) * (1 + ran / seconds)) if seconds else 0.0
    )  # of the pilot's pace, and of the rest's
    tried = []
    for tokens in rounds:
        growth = draws.gauss(0.0, 1.0)
        other = fast_growth if growth > 0 else slow_growth
        grown = (other / decode) ** abs(growth) if decode else 1.0
        price = max(0.0, 1 + curve.prefill_error * draws.gauss(0.0, 1.0))
        computed = 1 - repeated * draws.uniform(_LEAST_FOUND, 1.0)
        work = decode * grown * (tokens / completion if completion else 1.0) + prefill * price * computed
        tried.append(ratio * work * exp(of_load * draws.gauss(0.0, 1.0)))
    return _interval(seconds, tried)


def _repeated(rest: Sequence[OpenRequest]) -> float:
    """Return the share of the prompts, by size, that an earlier request of the job has."""
    size = sum(request.size for request in rest)
    return sum(request.size for request in rest if request.repeats) / size if size else 0.0


def _texts(pilot: Pilot, lengths: JobLengths, draws: random.Random) -> list[int]:
    """Return drawn lengths of the texts that one worker decodes, in order."""
    found: list[int] = []
    for request in pilot.rest[:: pilot.workers]:
        curve = lengths.curve(request)
        found += [max(1, curve.quantile(draws.random(), request.max_tokens)) for _ in range(request.texts)]
        if len(found) >= _MAX_SIMULATED:
            break
    return found


def _interval(estimate: float, tried: Sequence[float]) -> Interval:
    ordered = sorted(tried)
    tail = (1 - LEVEL) / 2
    low, high = ordered[int(tail * len(ordered))], ordered[-1 - int(tail * len(ordered))]
    return Interval(estimate, min(low, estimate), max(high, estimate))
