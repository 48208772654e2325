"""The events of running jobs, told to all their readers: one subscription and one reading of SQL a job, however many.

What is published says only that there is news; what the news is stands in SQL, in order. A job's newest events are kept
ready for its readers in a ring of limited size; whoever has fallen behind it reads SQL at its own pace. So a reader
costs no memory but what it is being sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from jobs.messages import PartialEvent
from jobs.streaming.pubsub import signals
from jobs.streaming.sse import server_sent, tell
from storage import event_log
from storage.event_log import Cursor, Page
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason
from storage.statuses import FINAL_JOB_STATUSES

log = logging.getLogger(__name__)

PING = b": ping\n\n"

_PASSAGES_AT_ONCE = 100
_RING_BYTES = 2_000_000
_READS_AT_ONCE = 4  # of SQL, by all readers together: the routes need connections too
_GATHER_S = 0.02  # a commit is published as many messages; one look at SQL is enough for them
_RETRY_S = 1.0
_MOST_STARTED = 1_000
_POLL_S = 5.0  # silence after which SQL is asked anyway
_PING_S = 15.0  # silence after which a reader is told that its connection lives


@dataclass(frozen=True, slots=True)
class Batch:
    """Events for all readers that have been told everything before them."""

    before: Cursor
    after: Cursor
    events: bytes


class Broadcast:
    """The channels of one process; used on one event loop."""

    def __init__(self, database: Database, redis_url: str, *, poll_s: float = _POLL_S, ping_s: float = _PING_S) -> None:
        """Read from this database and listen at this server, as soon as there is a reader."""
        self._database = database
        self._redis_url = redis_url
        self._poll_s = poll_s
        self._ping_s = ping_s
        self._channels: dict[str, _Channel] = {}
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)

    async def settle(self, job_id: str, since: Cursor) -> Cursor:
        """Return a cursor if it can be of this job's story, else a new reader's."""
        return since.within((await self._read(job_id, None)).cursor)

    async def follow(self, job_id: str, since: Cursor) -> AsyncGenerator[bytes]:
        """Yield what a reader has not been told, as server-sent events, until the status of the job is final.

        The cursor must have been settled.
        """
        async with self._joined(job_id) as channel:
            while since.status not in FINAL_JOB_STATUSES:
                heard = channel.heard  # before the look, so that no news is missed between look and wait
                batch = await channel.next(since)
                if batch.events:
                    yield batch.events
                if batch.after == since and not await channel.wait(heard, self._ping_s):
                    yield PING
                since = batch.after

    @asynccontextmanager
    async def news(self, job_id: str) -> AsyncIterator[Callable[[], AsyncIterator[None]]]:
        """Yield what iterates over the moments at which there may be news of a job; the first is now."""
        async with self._joined(job_id) as channel:

            async def moments() -> AsyncIterator[None]:
                while True:
                    heard = channel.heard
                    yield
                    await channel.wait(heard, self._ping_s)

            yield moments

    @property
    def open_channels(self) -> int:
        """Jobs that are being listened to."""
        return len(self._channels)

    @asynccontextmanager
    async def _joined(self, job_id: str) -> AsyncIterator[_Channel]:
        """Join the channel of a job; the first reader opens it, the last one closes it."""
        channel = self._channels.get(job_id)
        if channel is None:
            channel = self._channels[job_id] = _Channel(job_id, self._read)
            channel.open(signals(self._redis_url, job_id, self._poll_s))
        channel.readers += 1
        try:
            yield channel
        finally:
            channel.readers -= 1
            if channel.readers == 0:
                del self._channels[job_id]
                await channel.close()

    async def _read(self, job_id: str, since: Cursor | None) -> Page:
        """Read what is behind a cursor; with None only where the story stands. Waits for a database that is away."""
        while True:
            try:
                async with self._reads:
                    return await asyncio.to_thread(self._read_now, job_id, since)
            except DATABASE_UNAVAILABLE as exc:
                log.warning("No events for job %s: %s", job_id, unavailable_reason(exc), extra=_away(job_id))
                await asyncio.sleep(_RETRY_S)

    def _read_now(self, job_id: str, since: Cursor | None) -> Page:
        with self._database.read() as session:
            if since is None:
                return event_log.head(session, job_id)
            return event_log.read(session, job_id, since, _PASSAGES_AT_ONCE)


class _Channel:
    """What the readers of one job share."""

    def __init__(self, job_id: str, read: Callable[[str, Cursor | None], Awaitable[Page]]) -> None:
        self.readers = 0
        self.heard = 0  # how often there was news
        self._job_id = job_id
        self._read = read
        self._cursor: Cursor | None = None  # of a reader that was told all that is in the ring
        self._ring: deque[Batch] = deque()
        self._ring_bytes = 0
        self._started: list[bytes] = []  # not in SQL: told with the next batch
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._reading: dict[Cursor, asyncio.Task[Batch]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def open(self, heard: AsyncGenerator[PartialEvent | None]) -> None:
        """Begin to listen."""
        self._tasks = [asyncio.create_task(self._listen(heard)), asyncio.create_task(self._keep_up())]

    async def close(self) -> None:
        """Stop listening."""
        tasks = [*self._tasks, *self._reading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def next(self, since: Cursor) -> Batch:
        """Return what follows for a reader: from the ring if it has kept up, else from SQL; empty if nothing does."""
        if since == self._cursor:
            return Batch(since, since, b"")
        for batch in reversed(self._ring):
            if batch.before == since:
                return batch
        reading = self._reading.get(since)
        if reading is None:  # readers who stand at the same place read once
            reading = self._reading[since] = asyncio.create_task(self._batch(since))
            reading.add_done_callback(lambda _: self._reading.pop(since))
        return await asyncio.shield(reading)

    async def wait(self, heard: int, timeout_s: float) -> bool:
        """Wait until there was more news than `heard`; return False if the time is over before."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.heard == heard:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _batch(self, since: Cursor) -> Batch:
        page = await self._read(self._job_id, since)
        events, after = await asyncio.to_thread(tell, self._job_id, page, since)  # a page may be large
        return Batch(since, after, events)

    async def _listen(self, heard: AsyncGenerator[PartialEvent | None]) -> None:
        async with aclosing(heard) as events:
            async for event in events:
                if event is not None and event.type == "started" and len(self._started) < _MOST_STARTED:
                    self._started.append(server_sent(event))
                self._wake.set()

    async def _keep_up(self) -> None:
        """Put into the ring what comes, until the job has ended."""
        cursor = self._cursor = (await self._read(self._job_id, None)).cursor
        self._tell_readers()
        while cursor.status not in FINAL_JOB_STATUSES:
            await self._wake.wait()
            await asyncio.sleep(_GATHER_S)
            self._wake.clear()
            while (batch := await self._batch(cursor)).events:
                self._add(batch)
                cursor = batch.after

    def _add(self, batch: Batch) -> None:
        started, self._started = b"".join(self._started), []
        self._ring.append(Batch(batch.before, batch.after, started + batch.events))
        self._ring_bytes += len(started) + len(batch.events)
        while self._ring_bytes > _RING_BYTES and len(self._ring) > 1:
            self._ring_bytes -= len(self._ring.popleft().events)
        self._cursor = batch.after
        self._tell_readers()

    def _tell_readers(self) -> None:
        self.heard += 1
        self._changed.set()
        self._changed = asyncio.Event()


def _away(job_id: str) -> dict[str, str]:
    return {"action": "story_unavailable", "job_id": job_id}
