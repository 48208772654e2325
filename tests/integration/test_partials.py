"""Follow a job through the event hub while Redis loses messages, sends unknown ones, restarts or is down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio

from jobs.messages import JobStatus, PartialEvent
from jobs.streaming.hub import EventHub
from jobs.streaming.pubsub import Publisher, channel
from jobs.streaming.sse import decode_events
from storage.event_log import Cursor
from storage.session import Database
from tests.conftest import free_port, start_redis, stop
from tests.integration.test_broadcast import Worker, database, rest_of, text_of

__all__ = ["database"]  # a fixture

EVENT = PartialEvent(job_id="job-1", request="a", index=0, type="tokens", seq=0, text="Hi", tokens=1)


@pytest.fixture
def start(database: Database) -> Iterator[Callable[[str], Worker]]:
    """Return a function that starts a worker which publishes at a URL."""
    workers: list[Worker] = []

    def worker_at(url: str) -> Worker:
        workers.append(Worker(database, url))
        return workers[-1]

    yield worker_at
    for worker in workers:
        worker.close()


def follow(database: Database, url: str, poll_s: float = 5.0) -> AsyncGenerator[bytes]:
    return EventHub(database, url, poll_s=poll_s).follow("job-1", Cursor())


def reading(database: Database, url: str, poll_s: float = 5.0) -> asyncio.Task[bytes]:
    return asyncio.create_task(asyncio.wait_for(rest_of(follow(database, url, poll_s)), 120))


async def subscribed(server_url: str, readers: int = 1) -> None:
    """Return when this number of readers has subscribed to the job."""
    async with redis.asyncio.Redis.from_url(server_url) as client:
        while (await client.pubsub_numsub(channel("job-1")))[0][1] != readers:
            await asyncio.sleep(0.01)


Start = Callable[[str], Worker]


def test_a_reader_receives_the_text_so_far_and_then_new_text(start: Start, database: Database, redis_url: str) -> None:
    worker = start(redis_url)
    worker.write()

    async def scenario() -> bytes:
        reader = reading(database, redis_url)
        await subscribed(redis_url)
        worker.write()
        worker.write(ends=True)
        return await reader

    sent = asyncio.run(scenario())
    assert text_of(sent) == worker.text
    events = list(decode_events(sent))
    assert [event.type for event in events[-2:]] == ["finished", "job"]
    assert events[-1].status is JobStatus.COMPLETED


def test_a_lost_message_loses_no_text(start: Start, database: Database, redis_url: str) -> None:
    worker = start(redis_url)

    async def scenario() -> bytes:
        reader = reading(database, redis_url)
        await subscribed(redis_url)
        worker.write()
        worker.write(lost=True)
        worker.write(ends=True)
        return await reader

    assert text_of(asyncio.run(scenario())) == worker.text


def test_a_late_reader_receives_everything_once(start: Start, database: Database, redis_url: str) -> None:
    worker = start(redis_url)
    worker.write()
    worker.write(ends=True)
    sent = asyncio.run(rest_of(follow(database, redis_url)))
    assert [event.type for event in decode_events(sent)] == ["tokens", "finished", "job"]
    assert text_of(sent) == worker.text


def test_after_silence_a_reader_reads_sql(start: Start, database: Database, redis_url: str) -> None:
    worker = start(redis_url)

    async def scenario() -> bytes:
        reader = reading(database, redis_url, poll_s=0.1)
        await subscribed(redis_url)
        worker.write(ends=True, lost=True)
        return await reader

    assert text_of(asyncio.run(scenario())) == worker.text


def test_a_message_that_is_not_an_event_is_skipped(start: Start, database: Database, redis_url: str) -> None:
    worker = start(redis_url)

    async def scenario() -> bytes:
        reader = reading(database, redis_url)
        await subscribed(redis_url)
        async with redis.asyncio.Redis.from_url(redis_url) as client:
            await client.publish(channel("job-1"), "{broken")
        worker.write(ends=True)
        return await reader

    assert text_of(asyncio.run(scenario())) == worker.text


def test_a_reader_needs_no_redis_server(start: Start, database: Database) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    worker = start(nowhere)
    worker.write(ends=True)
    assert text_of(asyncio.run(rest_of(follow(database, nowhere)))) == worker.text


def test_a_restart_of_the_redis_server_loses_no_text(start: Start, database: Database, tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"

    async def scenario() -> tuple[bytes, str]:
        server = start_redis(port, tmp_path)
        worker = start(url)
        reader = reading(database, url)
        await subscribed(url)
        worker.write()
        await asyncio.to_thread(stop, server)
        worker.write()
        server = await asyncio.to_thread(start_redis, port, tmp_path)
        try:
            await subscribed(url)
            worker.write(ends=True)
            return await reader, worker.text
        finally:
            stop(server)

    sent, text = asyncio.run(scenario())
    assert text_of(sent) == text


def test_the_publisher_says_what_anyone_can_read_with_redis_cli(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client, client.pubsub() as listener:
        listener.subscribe("basic:partials:job-1")
        assert listener.get_message(timeout=60) is not None
        publisher = Publisher(redis_url)
        publisher.publish([EVENT])
        message = listener.get_message(timeout=60)
        publisher.close()
    assert message is not None
    assert message["data"].startswith('{"v":1,"job_id":"job-1","request":"a","index":0,"choice":0,"seq":0,')


def test_a_publisher_without_a_server_neither_waits_nor_raises() -> None:
    publisher = Publisher(f"redis://127.0.0.1:{free_port()}/0")
    for _ in range(1000):
        publisher.publish([EVENT])
    publisher.close()
