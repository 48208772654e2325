"""What a step costs on this machine: measured milliseconds over rows and over batch size.

`verify_ms(rows)` prices a tree; `plain_step_ms(sequences)` is what speculation is compared with. Both start from the
calibration at start-up; plain steps taken while jobs run refine the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from worker.engine.draft_tree import FloatArray
from worker.engine.rows import IntArray

_WEIGHT = 0.1  # of a new sample in the running mean
_OUTLIER = 2.0  # a sample counts as at most so many times the mean


class CostModel:
    """Piecewise linear cost curves through measured points."""

    def __init__(self, verify_ms: Mapping[int, float], plain_step_ms: Mapping[int, float]) -> None:
        """Take milliseconds by rows of the forward, and by sequences of a plain step; neither is empty."""
        self._verify = dict(sorted(verify_ms.items()))
        self._plain = dict(sorted(plain_step_ms.items()))

    def verify_ms(self, rows: IntArray) -> FloatArray:
        """Return the time of a forward over so many rows, never falling as rows grow."""
        return _curve(self._verify, rows)

    def plain_step_ms(self, sequences: int) -> float:
        """Return the time of a whole plain step of so many sequences."""
        return float(_curve(self._plain, np.array([sequences]))[0])

    def observe_plain(self, sequences: int, step_ms: float) -> None:
        """Learn from a plain step that was really taken."""
        known = self.plain_step_ms(sequences)
        self._plain[sequences] = known + _WEIGHT * (min(step_ms, _OUTLIER * known) - known)
        self._plain = dict(sorted(self._plain.items()))

    def as_json(self) -> dict[str, Any]:
        """Return the curves for `workers.calibration`."""
        return {
            "verify_ms_by_rows": {str(k): round(v, 3) for k, v in self._verify.items()},
            "plain_step_ms_by_sequences": {str(k): round(v, 3) for k, v in self._plain.items()},
        }


def _curve(points: Mapping[int, float], at: IntArray) -> FloatArray:
    x = np.fromiter(points, np.float64)
    y = np.maximum.accumulate(np.fromiter(points.values(), np.float64))
    inside = np.interp(at, x, y)
    if len(x) < 2:
        return inside
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.where(at > x[-1], y[-1] + slope * (at - x[-1]), inside)
