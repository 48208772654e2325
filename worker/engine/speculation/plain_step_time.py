"""What plain decoding would take right now, known from the plain steps that were really taken.

The cost model is right enough to choose trees by, but it learns from steps with trees too, and an error there must not
pass for a slow plain step: speculation would look better than it is.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from worker.engine.speculation.cost_model import load_class

_WEIGHT = 0.1  # of a new sample in a running ratio, once there are enough to average
_OUTLIER = 1.5  # a sample counts as at most so many times the ratio so far, and at least as one part in so many
_ENOUGH = 2  # plain steps of a load class before its drafts can be judged


@dataclass(slots=True)
class _Ratio:
    """A running mean of taken over measured at calibration."""

    value: float = 1.0
    samples: int = 0

    def add(self, ratio: float) -> None:
        self.samples += 1
        if self.samples > 1:
            ratio = min(max(ratio, self.value / _OUTLIER), self.value * _OUTLIER)
        self.value += max(_WEIGHT, 1 / self.samples) * (ratio - self.value)


class PlainStepTimes:
    """By load class, how much longer plain steps and forwards take than the calibration says."""

    def __init__(self) -> None:
        """Start knowing nothing."""
        self._plain: defaultdict[int, _Ratio] = defaultdict(_Ratio)
        self._forwards: defaultdict[int, _Ratio] = defaultdict(_Ratio)  # by load class of their rows

    def unknown(self, sequences: int) -> bool:
        """Return whether too few plain steps of so many sequences were taken to judge drafts by."""
        return self._plain[load_class(sequences)].samples < _ENOUGH

    def observe_plain(self, sequences: int, measured_ms: float, step_ms: float) -> None:
        """Learn from a step without drafts, bookkeeping included."""
        self._plain[load_class(sequences)].add(step_ms / measured_ms)

    def observe_forward(self, rows: int, measured_ms: float, verify_ms: float) -> float:
        """Learn from any forward; return how much slower than usual the machine was at that moment."""
        ratio, usual = verify_ms / measured_ms, self._forwards[load_class(rows)]
        moment = ratio / usual.value if usual.samples else 1.0
        usual.add(ratio)
        return min(max(moment, 1 / _OUTLIER), _OUTLIER)

    def plain_ms(self, sequences: int, measured_ms: float) -> float:
        """Return what a plain step takes that took `measured_ms` at calibration."""
        return measured_ms * self._plain[load_class(sequences)].value
