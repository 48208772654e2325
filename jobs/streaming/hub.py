"""Stream the events of running jobs to any number of readers, with one subscription and one read of SQL per job.

A published message only says that something changed; the events themselves come from SQL, in order. A job's newest
events are kept in a ring buffer of limited size. A reader that falls behind it reads SQL at its own pace, so a slow
reader costs no memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from jobs.messages import PartialEvent
from jobs.streaming.pubsub import subscribe
from jobs.streaming.sse import encode_event, encode_page
from storage import event_log
from storage.event_log import Cursor, Page
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from storage.statuses import FINAL_JOB_STATUSES

log = logging.getLogger(__name__)

PING = b": ping\n\n"

_PAGE_EVENTS = 100
_BUFFER_BYTES = 2_000_000
_MAX_READS = 4  # concurrent reads of SQL by all readers, so that routes find a free connection
_GATHER_S = 0.02  # a commit is published as many messages, for which one read of SQL is enough
_RETRY_S = 1.0
_MAX_STARTED = 1_000
_POLL_S = 5.0  # read SQL after this much silence, in case Redis lost a message
_PING_S = 15.0  # send a keep-alive comment after this much silence


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Encoded events for all readers whose cursor is `before`; `after` is their cursor afterwards."""

    before: Cursor
    after: Cursor
    events: bytes
    complete: bool = True  # there was nothing more in SQL


class EventHub:
    """All followed jobs of one process. Used on one event loop."""

    def __init__(self, database: Database, redis_url: str, *, poll_s: float = _POLL_S, ping_s: float = _PING_S) -> None:
        """Connect only when a first reader follows a job."""
        self._database = database
        self._redis_url = redis_url
        self._poll_s = poll_s
        self._ping_s = ping_s
        self._channels: dict[str, _Channel] = {}
        self._reads = asyncio.Semaphore(_MAX_READS)

    async def validate_cursor(self, job_id: str, since: Cursor) -> Cursor:
        """Return the cursor if it is valid for this job's event log, else a new reader's."""
        return since.within((await self._read(job_id, None)).cursor)

    async def follow(self, job_id: str, since: Cursor) -> AsyncGenerator[bytes]:
        """Yield all events after the cursor as server-sent events, until the status of the job is final.

        The cursor must come from `validate_cursor`.
        """
        async with self._joined(job_id) as channel:
            while since.status not in FINAL_JOB_STATUSES:
                version = channel.version  # before the read, so that no change is missed between read and wait
                batch = await channel.next(since)
                if batch.events:
                    yield batch.events
                if batch.after == since and not await channel.wait(version, self._ping_s):
                    yield PING
                since = batch.after

    @asynccontextmanager
    async def changes(self, job_id: str) -> AsyncIterator[Callable[[], AsyncIterator[None]]]:
        """Yield an iterator that yields now, and then each time when the job may have changed."""
        async with self._joined(job_id) as channel:

            async def moments() -> AsyncIterator[None]:
                while True:
                    version = channel.version
                    yield
                    await channel.wait(version, self._ping_s)

            yield moments

    @property
    def open_channels(self) -> int:
        """The number of jobs that are being followed."""
        return len(self._channels)

    @asynccontextmanager
    async def _joined(self, job_id: str) -> AsyncIterator[_Channel]:
        """Join the channel of a job. The first reader opens it, the last one closes it."""
        channel = self._channels.get(job_id)
        if channel is None:
            channel = self._channels[job_id] = _Channel(job_id, self._read)
            channel.open(subscribe(self._redis_url, job_id, self._poll_s))
        channel.readers += 1
        try:
            yield channel
        finally:
            channel.readers -= 1
            if channel.readers == 0:
                del self._channels[job_id]
                await channel.close()

    async def _read(self, job_id: str, since: Cursor | None) -> Page:
        """Read the page after a cursor; with None, only the head of the event log. Retry while the database is down."""
        while True:
            try:
                async with self._reads:
                    return await asyncio.to_thread(self._read_now, job_id, since)
            except DATABASE_UNAVAILABLE as exc:
                log.warning(
                    "Can't read the events of job %s: %s", job_id, unavailable_reason(exc), extra=_extra(job_id)
                )
                await asyncio.sleep(_RETRY_S)

    def _read_now(self, job_id: str, since: Cursor | None) -> Page:
        with self._database.read() as session:
            if since is None:
                return event_log.head(session, job_id)
            return event_log.read(session, job_id, since, _PAGE_EVENTS)


class _Channel:
    """What the readers of one job share: the subscription, and a buffer of the newest events."""

    def __init__(self, job_id: str, read: Callable[[str, Cursor | None], Awaitable[Page]]) -> None:
        self.readers = 0
        self.version = 0  # grows with every change
        self._job_id = job_id
        self._read = read
        self._cursor: Cursor | None = None  # after the last event of the buffer
        self._buffer: deque[EventBatch] = deque()
        self._buffer_bytes = 0
        self._started: list[bytes] = []  # `started` events are not in SQL: send them with the next batch
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._reading: dict[Cursor, asyncio.Task[EventBatch]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def open(self, events: AsyncGenerator[PartialEvent | None]) -> None:
        """Start the tasks that listen for messages and fill the buffer from SQL."""
        self._tasks = [asyncio.create_task(self._listen(events)), asyncio.create_task(self._fill_buffer())]

    async def close(self) -> None:
        """Stop these tasks, and reads of SQL that still run."""
        tasks = [*self._tasks, *self._reading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def next(self, since: Cursor) -> EventBatch:
        """Return the events after a cursor, from the buffer if it has them, else from SQL; empty if there are none."""
        if since == self._cursor:
            return EventBatch(since, since, b"")
        for batch in reversed(self._buffer):
            if batch.before == since:
                return batch
        reading = self._reading.get(since)
        if reading is None:  # readers with the same cursor share one read
            reading = self._reading[since] = asyncio.create_task(self._batch(since))
            reading.add_done_callback(lambda _: self._reading.pop(since))
        return await asyncio.shield(reading)

    async def wait(self, version: int, timeout_s: float) -> bool:
        """Wait until the version is no longer `version`; return False at the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.version == version:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _batch(self, since: Cursor) -> EventBatch:
        page = await self._read(self._job_id, since)
        events, after = await asyncio.to_thread(encode_page, self._job_id, page, since)  # a page may be large
        return EventBatch(since, after, events, page.complete)

    async def _listen(self, events: AsyncGenerator[PartialEvent | None]) -> None:
        async with aclosing(events):
            async for event in events:
                if event is not None and event.type == "started" and len(self._started) < _MAX_STARTED:
                    self._started.append(encode_event(event))
                self._wake.set()

    async def _fill_buffer(self) -> None:
        """Append new events to the buffer until the job has ended."""
        cursor = self._cursor = (await self._read(self._job_id, None)).cursor
        self._notify_readers()
        loop = asyncio.get_running_loop()
        read_at = float("-inf")
        while cursor.status not in FINAL_JOB_STATUSES:
            await self._wake.wait()
            await asyncio.sleep(read_at + _GATHER_S - loop.time())  # the first read of a while does not wait
            self._wake.clear()
            read_at = loop.time()
            while (batch := await self._batch(cursor)).events:
                self._add(batch)
                cursor = batch.after
                if batch.complete:
                    break

    def _add(self, batch: EventBatch) -> None:
        started, self._started = b"".join(self._started), []
        self._buffer.append(replace(batch, events=started + batch.events))
        self._buffer_bytes += len(started) + len(batch.events)
        while self._buffer_bytes > _BUFFER_BYTES and len(self._buffer) > 1:
            self._buffer_bytes -= len(self._buffer.popleft().events)
        self._cursor = batch.after
        self._notify_readers()

    def _notify_readers(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()


def _extra(job_id: str) -> dict[str, str]:
    return {"action": "story_unavailable", "job_id": job_id}
