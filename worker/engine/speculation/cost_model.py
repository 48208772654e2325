"""The time of a step on this machine, in ms, by its rows and by the KV entries that they attend to.

`CostModel` predicts forwards of any size. It prices the step with trees and the step without, so an empty tree costs
exactly what plain decoding costs. `PlainStepTimes` measures plain steps only: drafts are judged by it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from math import log2
from operator import mul
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from worker.engine.host.nodes import FloatArray
from worker.engine.speculation.constants import (
    MAX_CORRECTION,
    MIN_PLAIN_STEPS,
    SHAPE_WEIGHT,
    TIME_OUTLIER,
    TIME_WEIGHT,
)
from worker.engine.speculation.running_mean import RunningMean, clip_ratio


class CostCurve(NamedTuple):
    """A step of `rows` rows takes `drift` times what the points say, plus `entry_ms` per KV entry attended to."""

    sizes: FloatArray  # [points] rows
    points: FloatArray  # [points] ms
    drift: float
    entry_ms: float


class CostModel:
    """A piecewise linear curve over the rows of a step, plus a price per attended KV entry.

    It starts from a calibration and learns from every step: `drift` is the factor of the whole machine (a busy
    neighbour, a throttled clock), and a slow correction per size is the error of that part of the curve.
    """

    def __init__(self, rows_ms: Mapping[int, float], entry_ms: float = 0.0) -> None:
        """Take ms by rows of a step (at least one size), and ms per KV entry that one row attends to."""
        self._sizes = [float(rows) for rows in sorted(rows_ms)]
        self._rows, self._log_rows = np.array(self._sizes), [log2(rows) for rows in self._sizes]
        self._ms = list(accumulate((float(rows_ms[int(rows)]) for rows in self._sizes), max))
        self._entry_ms = entry_ms
        self._correction = [1.0] * len(self._sizes)  # at each measured size
        self._points = self._ms  # measured times with the correction; a new list when they change
        self._drift = 1.0
        self._samples = 0

    @property
    def curve(self) -> CostCurve:
        """What `step_ms` computes from."""
        return CostCurve(self._rows, np.array(self._points), self._drift, self._entry_ms)

    def step_ms(self, rows: ArrayLike, entries: ArrayLike = 0.0) -> FloatArray:
        """Return the predicted time of steps with `rows` rows that attend to `entries` KV entries in all.

        It never falls with either.
        """
        some = np.asarray(rows, np.float64)
        ms = np.interp(some, self._rows, self._points)
        if len(self._sizes) > 1:  # np.interp is constant beyond the last point: extend its slope instead
            ms = ms + self._last_slope(self._points) * np.maximum(some - self._rows[-1], 0.0)
        result: FloatArray = self._drift * np.asarray(ms + self._entry_ms * np.asarray(entries, np.float64))
        return result

    def calibrated_ms(self, rows: int, entries: float) -> float:
        """Return the step time for `rows` rows and `entries` KV entries as calibrated, without later corrections."""
        return self._ms_of_one(self._ms, rows) + self._entry_ms * entries

    def observe(self, rows: int, entries: float, step_ms: float) -> None:
        """Learn from a forward of a served step."""
        self._samples += 1
        ratio = step_ms / (self._ms_of_one(self._points, rows) + self._entry_ms * entries)
        if self._samples > 1:
            ratio = clip_ratio(ratio, self._drift, TIME_OUTLIER)
        surprise = ratio / self._drift
        self._drift *= surprise ** max(TIME_WEIGHT, 1 / self._samples)
        # The sizes within a factor of two learn the rest; the drift has taken what all sizes have in common.
        log_rows = log2(rows)
        for at, log_size in enumerate(self._log_rows):
            nearness = 1.0 - abs(log_size - log_rows)
            if nearness > 0.0:
                correction = self._correction[at] * surprise ** (SHAPE_WEIGHT * nearness)
                self._correction[at] = min(max(correction, 1 / MAX_CORRECTION), MAX_CORRECTION)
        self._points = list(accumulate(map(mul, self._ms, self._correction), max))

    def as_json(self) -> dict[str, Any]:
        """Return the curve for `workers.calibration` and the calibration file."""
        return {
            "step_ms_by_rows": {str(int(r)): round(ms, 3) for r, ms in zip(self._rows, self._ms, strict=True)},
            "ms_per_1000_entries": round(self._entry_ms * 1000, 5),
            "correction_by_rows": {str(int(r)): round(c, 4) for r, c in zip(self._rows, self._correction, strict=True)},
            "drift": round(self._drift, 4),
            "steps_observed": self._samples,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the curve that `as_json` wrote, without what was learned from steps."""
        rows_ms = {int(rows): float(ms) for rows, ms in stored["step_ms_by_rows"].items()}
        return cls(rows_ms, float(stored["ms_per_1000_entries"]) / 1000)

    def _ms_of_one(self, points: list[float], rows: int) -> float:
        """Return the time of one number of rows on a curve; for one, this is much faster than NumPy."""
        at = bisect_right(self._sizes, rows)
        if at == 0:
            return points[0]
        slope = self._last_slope(points) if at == len(points) else self._slope(points, at)
        return points[at - 1] + slope * (rows - self._sizes[at - 1])

    def _last_slope(self, points: list[float]) -> float:
        return self._slope(points, len(points) - 1) if len(points) > 1 else 0.0

    def _slope(self, points: list[float], at: int) -> float:
        """Return the slope of a curve between a measured size and the one before."""
        return (points[at] - points[at - 1]) / (self._sizes[at] - self._sizes[at - 1])


class PlainStepTimes:
    """The current time of plain steps, by load class, relative to the calibrated time.

    Only plain steps are measured. The cost model also learns from steps with trees, and an error there would look like
    slow plain decoding: speculation would be credited with it.
    """

    def __init__(self) -> None:
        unknown = partial(RunningMean, TIME_WEIGHT, 1.0)
        self._plain: defaultdict[int, RunningMean] = defaultdict(unknown)
        self._forwards: defaultdict[int, RunningMean] = defaultdict(unknown)  # by load class of their rows
        self._passed_over: set[int] = set()  # load classes

    def passes_over(self, batch_size: int) -> bool:
        """Return whether a step right after a prefill, which is slower than others, is not to be learned from.

        It would count for half of the first judgement of drafts. Only the first of a load class is passed over, or
        a load that never decodes twice without a prefill between would stay unknown.
        """
        load = load_class(batch_size)
        if self._plain[load].samples or load in self._passed_over:
            return False
        self._passed_over.add(load)
        return True

    def unknown(self, batch_size: int) -> bool:
        """Return whether drafts can't be judged yet: too few plain steps of this load class were taken."""
        return self._plain[load_class(batch_size)].samples < MIN_PLAIN_STEPS

    def observe_plain(self, batch_size: int, calibrated_ms: float, step_ms: float) -> None:
        """Learn from a step without drafts; `step_ms` includes bookkeeping."""
        mean = self._plain[load_class(batch_size)]
        mean.add(mean.clipped(step_ms / calibrated_ms, TIME_OUTLIER))

    def observe_forward(self, rows: int, calibrated_ms: float, verify_ms: float) -> float:
        """Learn from a forward, plain or not; return how much slower than usual the machine was at that moment."""
        ratio, usual = verify_ms / calibrated_ms, self._forwards[load_class(rows)]
        slowdown = ratio / usual.value if usual.samples else 1.0
        usual.add(usual.clipped(ratio, TIME_OUTLIER))
        return clip_ratio(slowdown, 1.0, TIME_OUTLIER)

    def plain_ms(self, batch_size: int, calibrated_ms: float) -> float:
        """Return the current time, in ms, of a plain step that took `calibrated_ms` at calibration."""
        return calibrated_ms * self._plain[load_class(batch_size)].value


LOAD_CLASSES = 32  # more than there are


def load_class(size: int) -> int:
    """Return the class of sizes that share statistics: 1, 2, 3-4, 5-8, 9-16, …"""
    return max(size - 1, 0).bit_length()
