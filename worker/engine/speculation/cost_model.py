"""What a step costs on this machine: milliseconds over its rows and over the entries that they attend to.

One model prices the step with trees and the step without, so the empty tree costs exactly what plain decoding costs. It
starts from a calibration and is refined by the steps that are served: `drift` says how far the whole machine is off by
now (a busy neighbour, a throttled clock), and a slow correction per size how far one part of the curve is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from worker.engine.speculation.draft_tree import FloatArray

_DRIFT_WEIGHT = 0.1  # of a new step in the machine's drift, once there are enough to average
_SHAPE_WEIGHT = 0.03  # of a new step in the correction of its size
_OUTLIER = 1.5  # a step counts as at most so many times what was expected, and at least as one part in so many
_LARGEST = 2.0  # correction of one size


class CostModel:
    """A piecewise linear curve through measured points, and a price per attended entry."""

    def __init__(self, rows_ms: Mapping[int, float], entry_ms: float = 0.0) -> None:
        """Take milliseconds by rows of a step, not empty, and of one KV entry that one row attends to."""
        self._rows = np.fromiter(sorted(rows_ms), np.float64)
        self._ms = np.maximum.accumulate([rows_ms[int(rows)] for rows in self._rows])
        self._entry_ms = entry_ms
        self._correction = np.ones(len(self._rows))  # at each measured point
        self._points = self._ms  # with it
        self._drift = 1.0
        self._samples = 0

    def step_ms(self, rows: ArrayLike, entries: ArrayLike = 0.0) -> FloatArray:
        """Return the time of a step of so many rows that attend to so many entries in all; rising in both."""
        return self._drift * self._undrifted(np.asarray(rows, np.float64), np.asarray(entries, np.float64))

    def measured_ms(self, rows: int, entries: float) -> float:
        """Return the time of such a step as the calibration has it, without what was learned since."""
        return float(self._along(self._ms, np.asarray(rows, np.float64), np.asarray(entries, np.float64)))

    def observe(self, rows: int, entries: float, step_ms: float) -> None:
        """Learn from a step that was served."""
        self._samples += 1
        undrifted = float(self._undrifted(np.float64(rows), np.float64(entries)))
        off = step_ms / undrifted
        if self._samples > 1:
            off = min(max(off, self._drift / _OUTLIER), self._drift * _OUTLIER)
        surprise = off / self._drift
        self._drift *= surprise ** max(_DRIFT_WEIGHT, 1 / self._samples)
        # The points beside this size share the rest; what the drift has taken is the machine's, not the size's.
        nearness = np.clip(1.0 - np.abs(np.log2(self._rows / rows)), 0.0, 1.0)
        self._correction = np.clip(self._correction * surprise ** (_SHAPE_WEIGHT * nearness), 1 / _LARGEST, _LARGEST)
        self._points = np.maximum.accumulate(self._ms * self._correction)

    def as_json(self) -> dict[str, Any]:
        """Return the curve for `workers.calibration`."""
        return {
            "step_ms_by_rows": {str(int(r)): round(ms, 3) for r, ms in zip(self._rows, self._ms, strict=True)},
            "ms_per_1000_entries": round(self._entry_ms * 1000, 5),
            "correction_by_rows": {str(int(r)): round(c, 4) for r, c in zip(self._rows, self._correction, strict=True)},
            "drift": round(self._drift, 4),
            "steps_observed": self._samples,
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Return the curve that `as_json` told, without what was learned from steps."""
        rows_ms = {int(rows): float(ms) for rows, ms in said["step_ms_by_rows"].items()}
        return cls(rows_ms, float(said["ms_per_1000_entries"]) / 1000)

    def _undrifted(self, rows: FloatArray | np.float64, entries: FloatArray | np.float64) -> FloatArray:
        return self._along(self._points, rows, entries)

    def _along(self, points: FloatArray, rows: FloatArray | np.float64, entries: FloatArray | np.float64) -> FloatArray:
        ms = np.interp(rows, self._rows, points)
        if len(points) > 1:  # beyond the last point the curve goes on as it ended
            slope = (points[-1] - points[-2]) / (self._rows[-1] - self._rows[-2])
            ms = ms + slope * np.maximum(rows - self._rows[-1], 0.0)
        result: FloatArray = np.asarray(ms + self._entry_ms * entries)
        return result


def load_class(sequences: int) -> int:
    """Return which batches are alike enough to share what was learned: 1, 2, 3-4, 5-8, 9-16, …"""
    return max(sequences - 1, 0).bit_length()
