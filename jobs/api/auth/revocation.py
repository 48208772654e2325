"""Answers that last, watched: one whose key opens nothing any more is cut off within a second.

The keys of all open answers are asked about at once, twice a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Send

from storage import keys
from storage.session import DATABASE_AWAY, Database, why_away

log = logging.getLogger(__name__)

_LOOK_S = 0.5


class Watch:
    """The open answers of one process, used from its event loop alone."""

    def __init__(self, database: Database) -> None:
        """Start with none."""
        self._database = database
        self._answers: set[_Answer] = set()
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def over(self, key_id: str, send: Send) -> Iterator[Send]:
        """Yield what sends an answer; the block ends early, without an error, when the key is revoked or expires."""
        answer = _Answer(key_id)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add(answer)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._answers.discard(answer)  # complete: what is left to do is none of the reader's business

        try:
            yield watched
        except asyncio.CancelledError:
            if not answer.was_cut():
                raise
            log.info("A stream of key %s is cut: the key opens nothing any more", key_id, extra={"action": "cut"})
        finally:
            self._answers.discard(answer)

    def _add(self, answer: _Answer) -> None:
        self._answers.add(answer)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        """Cut the answers whose keys are gone, for as long as there are answers."""
        while self._answers:
            await asyncio.sleep(_LOOK_S)
            asked = {answer.key_id for answer in self._answers}
            try:
                good = await asyncio.to_thread(self._opening, asked)
            except DATABASE_AWAY as away:  # it could not say yes to a new call either, but it has said so to these
                log.warning("Open streams are not checked: %s", why_away(away), extra={"action": "database_away"})
                continue
            for answer in [answer for answer in self._answers if answer.key_id in asked - good]:
                answer.cut()

    def _opening(self, key_ids: set[str]) -> set[str]:
        with self._database.read() as session:
            return keys.opening(session, key_ids)


class _Answer:
    """An answer that is being sent by the present task."""

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelled_before = task.cancelling()
        self._cut = False

    def cut(self) -> None:
        """Stop sending."""
        if not self._cut:
            self._cut = True
            self._task.cancel()

    def was_cut(self) -> bool:
        """Take our cancelling back, and return whether it was the only one."""
        return self._cut and self._task.uncancel() <= self._cancelled_before
