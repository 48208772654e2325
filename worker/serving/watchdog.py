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

    stall_s: float  # longest time between two iterations of the engine
    deaf_s: float  # longest time between a message to oneself and hearing it
    _iterations: int = -1
    _progress_at: float = field(default=float("inf"))
    _pulse_pending_since: float | None = None

    def record_iterations(self, iterations: int, now: float) -> bool:
        """Take note of the engine's counter and return whether it has moved since the last look."""
        moved = iterations != self._iterations
        if moved:
            self._iterations, self._progress_at = iterations, now
        return moved

    def pulse_sent(self, *, delivered: bool, now: float) -> None:
        """Take note of a message to oneself. Where Redis did not take it, nothing can be said about the consumer."""
        if not delivered:
            self._pulse_pending_since = None
        elif self._pulse_pending_since is None:
            self._pulse_pending_since = now

    def pulse_received(self) -> None:
        """Take note that a message to oneself has come."""
        self._pulse_pending_since = None

    def restart_reason(self, now: float) -> str | None:
        """Return why the process should end; None while it is of use."""
        if now - self._progress_at > self.stall_s:
            return f"the engine has not finished a step for {now - self._progress_at:.0f} s"
        if self._pulse_pending_since is not None and now - self._pulse_pending_since > self.deaf_s:
            return f"no message has come from Redis for {now - self._pulse_pending_since:.0f} s, though it takes them"
        return None
