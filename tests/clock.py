"""A clock that tests set, so that laws about time hold on a busy machine, too."""

from __future__ import annotations


class Clock:
    """A clock that moves only when a test moves it. Call it for its time in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self.now_s += seconds
