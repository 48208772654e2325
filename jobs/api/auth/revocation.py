"""Close open responses within a second of their API key being revoked or expiring.

One query, twice a second, checks the keys of all open responses together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Send

from storage import keys
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason

log = logging.getLogger(__name__)

_POLL_S = 0.5


class RevocationMonitor:
    """The open responses of one process. Use from its event loop only."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._responses: set[_OpenResponse] = set()
        self._polling: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, key_id: str, send: Send) -> Iterator[Send]:
        """Yield a `send` for the response; leave the block early, without an error, when the key becomes invalid."""
        response = _OpenResponse(key_id)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add(response)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._responses.discard(response)  # complete: background work after it may finish

        try:
            yield watched
        except asyncio.CancelledError:
            if not response.was_cancelled():
                raise
            log.info("Closed a stream: key %s was revoked or has expired", key_id, extra={"action": "cut"})
        finally:
            self._responses.discard(response)

    def _add(self, response: _OpenResponse) -> None:
        self._responses.add(response)
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        """Cancel the responses of invalid keys, as long as responses are open."""
        while self._responses:
            await asyncio.sleep(_POLL_S)
            checked = {response.key_id for response in self._responses}
            try:
                valid = await asyncio.to_thread(self._valid_keys, checked)
            except DATABASE_UNAVAILABLE as error:
                # these keys were valid before: an outage is no reason to close their streams
                log.warning(
                    "Can't check keys of open streams: %s", unavailable_reason(error), extra={"action": "database_away"}
                )
                continue
            for response in [response for response in self._responses if response.key_id in checked - valid]:
                response.cancel()

    def _valid_keys(self, key_ids: set[str]) -> set[str]:
        with self._database.read() as session:
            return keys.valid_keys(session, key_ids)


class _OpenResponse:
    """A response that the current task is sending."""

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelled_before = task.cancelling()
        self._cancelled = False

    def cancel(self) -> None:
        """Cancel the sending task, once."""
        if not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def was_cancelled(self) -> bool:
        """Undo our cancellation; return whether the task was cancelled by us alone."""
        return self._cancelled and self._task.uncancel() <= self._cancelled_before
