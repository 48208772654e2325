"""Open streams, counted: an answer that lasts takes a place while it does, so that nobody takes them all.

A stream holds a connection and a subscription, so one key has fewer places than there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import cast

from fastapi import Depends, Request

from jobs.api.auth.caller import CallerNow
from jobs.errors import LimitReached

_RETRY_S = 5.0


class Streams:
    """The places of one process, used from its event loop alone."""

    def __init__(self, most: int, most_per_key: int) -> None:
        """Start with all places free."""
        self._most = most
        self._most_per_key = most_per_key
        self._open: Counter[str] = Counter()

    @contextmanager
    def place(self, key_id: str) -> Iterator[None]:
        """Hold a place; raise LimitReached if there is none for this key ('': those without, who share)."""
        if self._open.total() >= self._most:
            raise LimitReached(f"{self._most} streams are open, as many as there may be.", retry_after_s=_RETRY_S)
        if key_id and self._open[key_id] >= self._most_per_key:
            raise LimitReached(f"This key may keep {self._most_per_key} streams open.", retry_after_s=_RETRY_S)
        self._open[key_id] += 1
        try:
            yield
        finally:
            self._open[key_id] -= 1
            if not self._open[key_id]:
                del self._open[key_id]


async def _place(request: Request, caller: CallerNow) -> AsyncIterator[None]:
    streams = cast(Streams, request.app.state.streams)
    with streams.place(caller.key_id):
        yield


# For routes whose answer may last: the place is given back when the last byte is sent or the client is gone.
StreamPlace = Depends(_place)

__all__ = ["StreamPlace", "Streams"]
