"""A running mean: the one estimator of times, ratios and gains in this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(slots=True)
class RunningMean:
    """Arithmetic mean of the first `1 / weight` samples, then an exponentially weighted one."""

    weight: float  # of a new sample, once there are enough
    value: float = 0.0  # before the first sample: what to assume
    samples: int = 0

    @classmethod
    def settled(cls, weight: float, value: float) -> Self:
        """Return a mean that is known already: even the first sample moves it by `weight` only."""
        return cls(weight, value, round(1 / weight))

    def record(self) -> list[float]:
        """Return the value and the number of samples, for `restore`."""
        return [round(self.value, 6), self.samples]

    def restore(self, stored: Sequence[float]) -> None:
        """Continue from what `record` returned."""
        self.value, self.samples = float(stored[0]), int(stored[1])

    def add(self, sample: float) -> None:
        """Add a sample."""
        self.samples += 1
        self.value += max(self.weight, 1 / self.samples) * (sample - self.value)

    def clipped(self, sample: float, factor: float) -> float:
        """Return a sample, no further than `factor` from the mean either way; the first one as it is."""
        return clip_ratio(sample, self.value, factor) if self.samples else sample


def clip_ratio(value: float, center: float, factor: float) -> float:
    """Return a positive value, at least `center / factor` and at most `center * factor`."""
    return min(max(value, center / factor), center * factor)
