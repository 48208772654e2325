"""Drop events of a job that a client has received before, over another connection.

Pure: no Redis, no SQL, no HTTP.
"""

from __future__ import annotations

from jobs.messages import JobStatus, PartialEvent


class EventFilter:
    """Accepts each event of a job once. Remembers the last `seq` of every (request, choice)."""

    def __init__(self) -> None:
        self._last_seq: dict[tuple[int, int], int] = {}
        self._ended: set[tuple[int, int]] = set()
        self._status: JobStatus | None = None

    def accept(self, event: PartialEvent) -> bool:
        """Return whether the event is new, and remember it."""
        if event.index is None:
            return self._accept_status(event.status)
        key = _key(event)
        # A `failed` event may have seq 0 after events with a higher one: the service itself sends it.
        seen = event.type != "failed" and event.seq <= self._last_seq.get(key, -1)
        if seen or key in self._ended:
            return False
        self._last_seq[key] = event.seq
        if event.type in ("finished", "failed"):
            self._ended.add(key)
        return True

    def _accept_status(self, status: JobStatus | None) -> bool:
        if status is self._status:
            return False
        self._status = status
        return True


def _key(event: PartialEvent) -> tuple[int, int]:
    assert event.index is not None
    return event.index, event.choice
