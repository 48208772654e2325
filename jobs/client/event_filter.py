"""Drop events of a job that a reader has received before, and detect gaps between events.

The server uses it between pub/sub and SQL, the client between two connections. Pure: no Redis, no SQL, no HTTP.
"""

from __future__ import annotations

from jobs.messages import JobStatus, PartialEvent


class EventFilter:
    """Accepts each event of a job once. Remembers the last `seq` of every (request, choice)."""

    def __init__(self) -> None:
        self._last_seq: dict[tuple[int, int], int] = {}
        self._ended: set[tuple[int, int]] = set()
        self._status: JobStatus | None = None

    def is_next(self, event: PartialEvent) -> bool:
        """Return False if the reader must query SQL: an earlier event is missing, or the event is about the job."""
        return event.index is not None and event.seq <= self._last_seq.get(_key(event), -1) + 1

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
