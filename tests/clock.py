"""A clock that tests set: laws about time then hold on every machine, however busy it is."""

from __future__ import annotations


class Clock:
    """Stands where the test puts it. Called, it returns its time in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds
