from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path

import pytest

from jobs.bench.streams import StreamLoad, measure
from jobs.messages import PartialEvent
from jobs.streaming import hub
from jobs.streaming.hub import PING, EventHub
from jobs.streaming.pubsub import Publisher
from storage.event_log import Cursor
from storage.models import Base
from storage.records import RequestProgress
from storage.session import Database
from tests.conftest import free_port
from tests.unit.storage.acts import claim, end_of, flush, record, tokens_of


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database.open(f"sqlite:///{tmp_path / 'basic.sqlite3'}")
    Base.metadata.create_all(database.engine)
    yield database
    database.dispose()


class Worker:
    """Commits one text word by word and publishes an event per commit, except those that a test loses."""

    def __init__(self, database: Database, redis_url: str) -> None:
        record(database, "job-1")
        self._database = database
        (self._claim,) = claim(database)
        self._publisher = Publisher(redis_url)
        self._made = [tokens_of(1, 1)]

    @property
    def text(self) -> str:
        return "".join(checkpoint.text for checkpoint in self._made[:-1])

    def write(self, *, ends: bool = False, lost: bool = False) -> None:
        checkpoint = self._made[-1]
        finished = (end_of(*self._made),) if ends else ()
        flush(self._database, "w1", RequestProgress(self._claim.lease, (checkpoint,), finished, ends=ends))
        if not lost:
            event = PartialEvent(job_id="job-1", request="a", index=0, seq=checkpoint.seq, type="tokens")
            self._publisher.publish([event])
        self._made.append(tokens_of(checkpoint.seq + 1, 2, first=checkpoint.seq))

    def close(self) -> None:
        self._publisher.close()


def text_of(events: bytes) -> str:
    text = ""
    for line in events.splitlines():
        if line.startswith(b"data: ") and (event := json.loads(line[6:]))["type"] == "tokens":
            text = event["text"] if event["snapshot"] else text + event["text"]
    return text


async def told(reader: AsyncIterator[bytes]) -> bytes:
    """Return the next event of a reader; skip keep-alives."""
    async for events in reader:
        if events != PING:
            return events
    raise AssertionError("the stream ended")


async def rest_of(reader: AsyncGenerator[bytes]) -> bytes:
    return b"".join([events async for events in reader if events != PING])


def test_every_reader_receives_each_event_once_also_late_and_after_reconnects() -> None:
    figures = measure(StreamLoad(readers=9, requests=4, commits=8, interval_s=0.2))
    assert (figures.readers_with_wrong_text, figures.readers_with_duplicates) == (0, 0)
    assert (figures.reconnected, figures.late) == (3, 3)


def test_a_reader_that_falls_behind_the_buffer_continues_from_sql(
    database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_BUFFER_BYTES", 1)
    worker = Worker(database, redis_url)

    async def scenario() -> None:
        channels = EventHub(database, redis_url, poll_s=0.2)
        slow, quick = (channels.follow("job-1", Cursor()) for _ in range(2))
        worker.write()
        first = await told(slow)
        seen = b""
        for _ in range(6):
            worker.write()
            while text_of(seen) != worker.text:
                seen += await told(quick)
        worker.write(ends=True)
        assert text_of(seen + await rest_of(quick)) == worker.text
        assert text_of(first + await rest_of(slow)) == worker.text
        assert channels.open_channels == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))
    worker.close()


def test_without_a_redis_server_readers_receive_all_events(database: Database) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    worker = Worker(database, nowhere)

    async def scenario() -> None:
        reader = EventHub(database, nowhere).follow("job-1", Cursor())
        worker.write()
        first = await told(reader)
        worker.write(ends=True)
        assert text_of(first + await rest_of(reader)) == worker.text

    asyncio.run(asyncio.wait_for(scenario(), 60))
    worker.close()


def test_a_silent_stream_gives_signs_of_life(database: Database, redis_url: str) -> None:
    record(database, "job-1")

    async def scenario() -> list[bytes]:
        reader = EventHub(database, redis_url, ping_s=0.05).follow("job-1", Cursor())
        heard = [await anext(reader) for _ in range(3)]
        await reader.aclose()
        return heard

    assert asyncio.run(asyncio.wait_for(scenario(), 60))[1:] == [PING, PING]
