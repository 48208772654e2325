"""Decide when a running but stuck worker process must exit, so that its supervisor restarts it.

Two failures leave the process running: the engine thread hangs in a step (its iteration counter stands still), or the
Celery consumer receives no messages (a pulse that the worker sends to itself does not arrive). A request process that
hangs sends nothing; it alone is restarted. The clock is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_START_S = 300.0  # longest start of a request process
_SILENT_LOOKS = 2  # a worker that was frozen itself has unread messages at the first look


@dataclass(slots=True)
class Watchdog:
    """Observations of one worker process. Times are monotonic seconds."""

    stall_s: float  # max time between two iterations of the engine thread
    deaf_s: float  # max time between sending and receiving a pulse
    _iterations: int = -1
    _progress_at: float = field(default=float("inf"))
    _pulse_pending_since: float | None = None
    _silent_looks: int = 0

    def record_iterations(self, iterations: int, now: float) -> bool:
        """Record the engine's iteration counter; return whether it has changed since the last call."""
        moved = iterations != self._iterations
        if moved:
            self._iterations, self._progress_at = iterations, now
        return moved

    def pulse_sent(self, *, delivered: bool, now: float) -> None:
        """Record a pulse. One that Redis did not take says nothing about the consumer."""
        if not delivered:
            self._pulse_pending_since = None
        elif self._pulse_pending_since is None:
            self._pulse_pending_since = now

    def pulse_received(self) -> None:
        """Record that a pulse has arrived."""
        self._pulse_pending_since = None

    def record_heard(self, heard_at: float, now: float, *, starting: bool = False) -> bool:
        """Record when the request process was last heard; return whether it hangs. One late look is no proof."""
        limit_s = max(self.stall_s, _START_S) if starting else self.stall_s
        self._silent_looks = self._silent_looks + 1 if now - heard_at > limit_s else 0
        return self._silent_looks >= _SILENT_LOOKS

    def restart_reason(self, now: float) -> str | None:
        """Return why the process must restart; None while it works."""
        if now - self._progress_at > self.stall_s:
            return f"the engine has not finished a step for {now - self._progress_at:.0f} s"
        if self._pulse_pending_since is not None and now - self._pulse_pending_since > self.deaf_s:
            waited_s = now - self._pulse_pending_since
            return f"no message has arrived from Redis for {waited_s:.0f} s, though Redis accepts messages"
        return None
