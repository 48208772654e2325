"""What a step costs on this machine: measured milliseconds over rows and over batch size.

`verify_ms(rows)` prices a tree; `plain_step_ms(sequences)` is what speculation is compared with. Both start from the
calibration at start-up. Plain steps taken while jobs run say how far the machine has drifted from it: a longer context,
a busy neighbour, a throttled clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from worker.engine.draft_tree import FloatArray
from worker.engine.rows import IntArray

_WEIGHT = 0.1  # of a new sample in the running mean, once there are enough to average
_OUTLIER = 2.0  # a sample counts as at most so many times the mean, and at least as one part in so many


class CostModel:
    """Piecewise linear cost curves through measured points."""

    def __init__(self, verify_ms: Mapping[int, float], plain_step_ms: Mapping[int, float]) -> None:
        """Take milliseconds by rows of the forward, and by sequences of a plain step; neither is empty."""
        self._verify = dict(sorted(verify_ms.items()))
        self._plain = dict(sorted(plain_step_ms.items()))
        self._drift = 1.0  # plain steps now, relative to the calibration
        self._samples = 0

    def verify_ms(self, rows: IntArray) -> FloatArray:
        """Return the time of a forward over so many rows, never falling as rows grow."""
        return _curve(self._verify, rows)

    def plain_step_ms(self, sequences: int) -> float:
        """Return the time of a whole plain step of so many sequences."""
        return self._drift * self._calibrated_ms(sequences)

    def observe_plain(self, sequences: int, step_ms: float) -> None:
        """Learn from a plain step that was really taken."""
        self._samples += 1
        drift = step_ms / self._calibrated_ms(sequences)
        if self._samples > 1:
            drift = min(max(drift, self._drift / _OUTLIER), self._drift * _OUTLIER)
        self._drift += max(_WEIGHT, 1 / self._samples) * (drift - self._drift)

    def as_json(self) -> dict[str, Any]:
        """Return the curves for `workers.calibration`."""
        return {
            "verify_ms_by_rows": {str(k): round(v, 3) for k, v in self._verify.items()},
            "plain_step_ms_by_sequences": {str(k): round(v, 3) for k, v in self._plain.items()},
            "plain_drift": round(self._drift, 4),
            "plain_samples": self._samples,
        }

    def _calibrated_ms(self, sequences: int) -> float:
        return float(_curve(self._plain, np.array([sequences]))[0])


def _curve(points: Mapping[int, float], at: IntArray) -> FloatArray:
    x = np.fromiter(points, np.float64)
    y = np.maximum.accumulate(np.fromiter(points.values(), np.float64))
    inside = np.interp(at, x, y)
    if len(x) < 2:
        return inside
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.where(at > x[-1], y[-1] + slope * (at - x[-1]), inside)
