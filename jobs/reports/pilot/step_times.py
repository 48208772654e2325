"""How long a job will take, from the steps of its pilot: times by batch size, prefill, and the batch it reaches."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Final

_BIN_STEPS: Final = 12  # steps that make a batch size a point of the curve
_MAX_GROWTH: Final = 1.1  # of the time of a row with the batch: a calibration beside other programs may say more
_BLOCKS: Final = (16, 8, 4)  # of consecutive steps: how much the pace of the machine varies


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step of the pilot."""

    sequences: int  # that shared it
    ms: float  # from the end of the step before, so that pauses between steps count
    emitted: float  # mean tokens of a sequence; 0: all sequences had their first token
    prefilled_tokens: int = 0  # of prompts whose first token it emitted
    with_prefill: bool = False  # it computed a prompt, or a part of one


class StepCurve:
    """Milliseconds for one more token of every sequence, by batch size."""

    def __init__(
        self,
        steps: Sequence[MeasuredStep],
        rows_ms: Mapping[int, float],
        rows_per_sequence: float,
        growth: float = 1.0,
    ) -> None:
        """Fit to the steps. Beyond their largest batch, times grow as the worker's calibrated `rows_ms` do.

        `growth` is a power of that growth, to see what another one would mean.
        """
        self._growth = growth
        decoding = [step for step in steps if step.emitted]
        self._points = list(_bins([step for step in decoding if not step.with_prefill] or decoding))
        self._rows_ms = sorted(rows_ms.items())
        self._rows_per_sequence = max(1.0, rows_per_sequence)
        tokens = sum(step.prefilled_tokens for step in steps)
        extra = [step.ms - self.step_ms(step.sequences) for step in steps if step.with_prefill]
        self.prefill_ms = max(0.0, sum(extra) / tokens) if tokens else 0.0  # per prompt token
        self.prefill_error = _relative_error(extra)  # of that price: its standard error, as a share of it

    def step_ms(self, sequences: int) -> float:
        """Return the time of a step without prefill."""
        return self._at(sequences)[0]

    def token_ms(self, sequences: int) -> float:
        """Return the time in which each of these sequences gets one token."""
        ms, emitted = self._at(sequences)
        return ms / emitted

    def predicted_ms(self, step: MeasuredStep) -> float:
        """Return what the curve says of a measured step."""
        return self.step_ms(step.sequences) + self.prefill_ms * step.prefilled_tokens

    def _at(self, sequences: float) -> tuple[float, float]:
        """Return the ms of a step with this many sequences, and the tokens that it emits for each, interpolated."""
        at = bisect_right(self._points, sequences, key=lambda point: point[0])
        if at == 0:
            return self._points[0][1:]
        low = self._points[at - 1]
        if at == len(self._points):
            grown = self._calibrated(sequences) / self._calibrated(low[0])
            return low[1] * min(grown, _MAX_GROWTH * sequences / low[0]) ** self._growth, low[2]
        high = self._points[at]
        share = (sequences - low[0]) / (high[0] - low[0])
        return low[1] + share * (high[1] - low[1]), low[2] + share * (high[2] - low[2])

    def _calibrated(self, sequences: float) -> float:
        """Return the calibrated time of a step; proportional to its rows without a calibration."""
        rows = sequences * self._rows_per_sequence
        if len(self._rows_ms) < 2:
            return rows
        at = min(max(1, bisect_right(self._rows_ms, (rows, float("inf")))), len(self._rows_ms) - 1)
        (r0, t0), (r1, t1) = self._rows_ms[at - 1 : at + 1]
        return max(t0 + (rows - r0) * (t1 - t0) / (r1 - r0), 1e-6)


def _bins(steps: Iterable[MeasuredStep]) -> Iterable[tuple[float, float, float]]:
    """Yield mean batch size, time and emitted tokens of groups of steps of adjacent batch sizes, ascending."""
    waiting: list[MeasuredStep] = []
    ordered = sorted(steps, key=lambda step: step.sequences)
    bins: list[list[MeasuredStep]] = []
    for step in ordered:
        if waiting and step.sequences != waiting[-1].sequences and len(waiting) >= _BIN_STEPS:
            bins.append(waiting)
            waiting = []
        waiting.append(step)
    if bins and len(waiting) < _BIN_STEPS:
        bins[-1] += waiting
    elif waiting:
        bins.append(waiting)
    for group in bins:
        count = len(group)
        yield (
            sum(step.sequences for step in group) / count,
            sum(step.ms for step in group) / count,
            sum(step.emitted for step in group) / count,
        )


def decode_ms(lengths: Iterable[int], slots: int, curve: StepCurve) -> float:
    """Return the time of texts of these lengths, in this order, of which `slots` are decoded at once; no prefill."""
    clock = ms = 0.0  # tokens of a sequence that has run from the start, and milliseconds
    running: list[float] = []  # clock at which each ends
    for length in lengths:
        if len(running) >= max(1, slots):
            end = heapq.heappop(running)
            ms += (end - clock) * curve.token_ms(len(running) + 1)
            clock = end
        heapq.heappush(running, clock + length)
    while running:
        end = heapq.heappop(running)
        ms += (end - clock) * curve.token_ms(len(running) + 1)
        clock = end
    return ms


def pace(steps: Sequence[MeasuredStep], curve: StepCurve) -> tuple[float, float]:
    """Return measured over predicted time of the steps, and the standard error of that ratio, as a share of it.

    The error is that of means of blocks of consecutive steps (batch means). Of several sizes of blocks the largest
    error counts: the load of a machine changes slowly, and short blocks would not see it.
    """
    times = [(step.ms, curve.predicted_ms(step)) for step in steps]
    ratio = sum(ms for ms, _ in times) / sum(predicted for _, predicted in times)
    return ratio, max(_error_by_blocks(times, ratio, blocks) for blocks in _BLOCKS)


def _error_by_blocks(times: Sequence[tuple[float, float]], ratio: float, blocks: int) -> float:
    size = max(1, -(-len(times) // blocks))
    parts = [times[start : start + size] for start in range(0, len(times), size)]
    if len(parts) < 2:
        return 0.0
    total = sum(predicted for _, predicted in times)
    off = [sum(ms for ms, _ in part) / ratio - sum(predicted for _, predicted in part) for part in parts]
    return sqrt(sum(value * value for value in off) * len(parts) / (len(parts) - 1)) / total


def _relative_error(values: Sequence[float]) -> float:
    """Return the standard error of a sum of values, as a share of it, at most 1; 1 for a single value."""
    count, total = len(values), sum(values)
    if count < 2 or total <= 0:
        return 1.0
    mean = total / count
    return min(1.0, sqrt(sum((value - mean) ** 2 for value in values) * count / (count - 1)) / total)
