"""What one reader of a job's events has been told, so that it is told everything once.

Pure: no Redis, no SQL, no HTTP. The shim uses it between pub/sub and SQL, the client between two connections.
"""

from __future__ import annotations

from jobs.messages import JobStatus, PartialEvent


class Reader:
    """Remembers how far each choice of a job has been told, and passes on only what is news."""

    def __init__(self) -> None:
        """Start with nothing told."""
        self._told: dict[tuple[int, int], int] = {}  # (request, choice) -> seq of the last event
        self._ended: set[tuple[int, int]] = set()
        self._status: JobStatus | None = None

    def follows(self, event: PartialEvent) -> bool:
        """Return False if something is missing before this event, or it is about the job: then SQL must be asked."""
        return event.index is not None and event.seq <= self._told.get(_key(event), -1) + 1

    def take(self, event: PartialEvent) -> bool:
        """Return whether the event is news, and remember it."""
        if event.index is None:
            return self._take_status(event.status)
        key = _key(event)
        # A request can fail before any of its choices has a number to count on.
        heard = event.type != "failed" and event.seq <= self._told.get(key, -1)
        if heard or key in self._ended:
            return False
        self._told[key] = event.seq
        if event.type in ("finished", "failed"):
            self._ended.add(key)
        return True

    def _take_status(self, status: JobStatus | None) -> bool:
        if status is self._status:
            return False
        self._status = status
        return True


def _key(event: PartialEvent) -> tuple[int, int]:
    assert event.index is not None
    return event.index, event.choice
