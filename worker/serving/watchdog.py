"""The watchdog: when a worker process that still runs is of no use, and had better end and be started again.

Two ways to be of no use while looking alive: the engine thread hangs in a step, or the Celery consumer has gone deaf
and hears no doorbell. The first shows in a counter that stands still. For the second the worker sends itself a message
now and then and waits for it. Knows no Celery and no SQL; time is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Watchdog:
    """What has been seen of one worker process. Times are monotonic seconds."""

    stall_s: float  # longest time between two turns of the engine
    deaf_s: float  # longest time between a message to oneself and hearing it
    _turns: int = -1
    _turned_at: float = field(default=float("inf"))
    _unheard_since: float | None = None

    def saw_turns(self, turns: int, now: float) -> bool:
        """Take note of the engine's counter and return whether it has moved since the last look."""
        moved = turns != self._turns
        if moved:
            self._turns, self._turned_at = turns, now
        return moved

    def sent(self, *, delivered: bool, now: float) -> None:
        """Take note of a message to oneself. Where Redis did not take it, nothing can be said about the consumer."""
        if not delivered:
            self._unheard_since = None
        elif self._unheard_since is None:
            self._unheard_since = now

    def heard(self) -> None:
        """Take note that a message to oneself has come."""
        self._unheard_since = None

    def verdict(self, now: float) -> str | None:
        """Return why the process should end; None while it is of use."""
        if now - self._turned_at > self.stall_s:
            return f"the engine has not finished a step for {now - self._turned_at:.0f} s"
        if self._unheard_since is not None and now - self._unheard_since > self.deaf_s:
            return f"no message has come from Redis for {now - self._unheard_since:.0f} s, though it takes them"
        return None
