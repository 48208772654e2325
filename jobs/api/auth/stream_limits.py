"""Limit concurrent streams, in total and per API key.

A stream holds a connection and a Redis subscription. One key may hold only some of them, so it can't lock others out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

from fastapi import Depends, Request

from jobs.api.auth.caller import CurrentCaller
from jobs.errors import LimitReached

_RETRY_AFTER_S = 5.0


class StreamLimits:
    """The stream slots of one process. Use from its event loop only."""

    def __init__(self, max_open: int, max_per_key: int) -> None:
        self._max_open = max_open
        self._max_per_key = max_per_key
        self._open: Counter[str] = Counter()  # key id -> open streams

    @contextmanager
    def slot(self, key_id: str) -> Iterator[None]:
        """Hold a slot; raise LimitReached if none is free. Callers without a key ('') have only the total limit."""
        if self._open.total() >= self._max_open:
            raise LimitReached(f"The limit of {self._max_open} open streams is reached.", retry_after_s=_RETRY_AFTER_S)
        if key_id and self._open[key_id] >= self._max_per_key:
            raise LimitReached(
                f"The limit of this key is {self._max_per_key} open streams.", retry_after_s=_RETRY_AFTER_S
            )
        self._open[key_id] += 1
        try:
            yield
        finally:
            self._open[key_id] -= 1
            if not self._open[key_id]:
                del self._open[key_id]


async def _slot(request: Request, caller: CurrentCaller) -> AsyncIterator[None]:
    limits = cast(StreamLimits, request.app.state.stream_limits)
    with limits.slot(caller.key_id):
        yield


async def _slot_of_a_stream(request: Request, caller: CurrentCaller, stream: bool = False) -> AsyncIterator[None]:
    limits = cast(StreamLimits, request.app.state.stream_limits)
    with limits.slot(caller.key_id) if stream else nullcontext():
        yield


# For routes with long responses: the slot is freed after the last byte, or when the client disconnects.
StreamSlot = Depends(_slot)
StreamSlotIfAsked = Depends(_slot_of_a_stream)  # for routes that stream with `?stream=true`

__all__ = ["StreamLimits", "StreamSlot", "StreamSlotIfAsked"]
