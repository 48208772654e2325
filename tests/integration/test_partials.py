from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from jobs.messages import JobStatus, PartialEvent
from jobs.streaming.pubsub import Publisher, channel, follow
from tests.conftest import free_port, start_redis, stop


class Record:
    """What SQL would say: the text of one choice, written by the test."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.status = JobStatus.IN_PROGRESS
        self.words: list[str] = []
        self.finish_reason: str | None = None

    def read(self) -> list[PartialEvent]:
        """Tell the story so far."""
        events = []
        if self.words:
            text = "".join(self.words)
            events.append(self.event("tokens", len(self.words) - 1, text=text, tokens=len(self.words), snapshot=True))
        if self.finish_reason is not None:
            events.append(self.event("finished", len(self.words), finish_reason=self.finish_reason))
        return [*events, PartialEvent(job_id=self.job_id, type="job", status=self.status)]

    def write(self, word: str) -> PartialEvent:
        """Commit a word and return the event to publish."""
        self.words.append(word)
        return self.event("tokens", len(self.words) - 1, text=word, tokens=1)

    def finish(self) -> Sequence[PartialEvent]:
        self.finish_reason = "stop"
        self.status = JobStatus.COMPLETED
        return (
            self.event("finished", len(self.words), finish_reason="stop"),
            PartialEvent(job_id=self.job_id, type="job", status=self.status),
        )

    def event(self, kind: Any, seq: int, **fields: Any) -> PartialEvent:
        return PartialEvent(job_id=self.job_id, request="a", index=0, type=kind, seq=seq, **fields)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    return Record(f"batch_{request.node.name}")


def text_of(events: Sequence[PartialEvent]) -> str:
    text = ""
    for event in events:
        text = event.text if event.snapshot else text + event.text
    return text


async def subscribed(server_url: str, job_id: str, readers: int = 1) -> None:
    """Return when so many readers listen to a job."""
    async with redis.asyncio.Redis.from_url(server_url) as client:
        while (await client.pubsub_numsub(channel(job_id)))[0][1] != readers:
            await asyncio.sleep(0.01)


async def collect(events: AsyncIterator[PartialEvent]) -> list[PartialEvent]:
    return [event async for event in events]


def test_a_reader_is_told_what_is_written_and_then_what_is_being_written(record: Record, redis_url: str) -> None:
    record.write("Once ")

    async def scenario() -> list[PartialEvent]:
        reading = asyncio.create_task(collect(follow(record.job_id, redis_url, record.read)))
        await subscribed(redis_url, record.job_id)
        publisher = Publisher(redis_url)
        publisher.publish([record.write("upon ")])
        publisher.publish([record.write("a time.")])
        publisher.publish(record.finish())
        publisher.close()
        return await asyncio.wait_for(reading, 10)

    events = asyncio.run(scenario())
    assert text_of(events) == "Once upon a time."
    assert [event.type for event in events[-2:]] == ["finished", "job"]
    assert events[-1].status is JobStatus.COMPLETED


def test_a_lost_event_is_made_up_for_from_sql(record: Record, redis_url: str) -> None:
    async def scenario() -> list[PartialEvent]:
        reading = asyncio.create_task(collect(follow(record.job_id, redis_url, record.read)))
        await subscribed(redis_url, record.job_id)
        publisher = Publisher(redis_url)
        publisher.publish([record.write("One ")])
        record.write("two ")  # committed, and its event lost
        publisher.publish([record.write("three")])
        publisher.publish(record.finish())
        publisher.close()
        return await asyncio.wait_for(reading, 10)

    assert text_of(asyncio.run(scenario())) == "One two three"


def test_a_reader_that_comes_late_is_told_everything_once(record: Record, redis_url: str) -> None:
    record.write("All ")
    record.write("done")
    record.finish()
    events = asyncio.run(collect(follow(record.job_id, redis_url, record.read)))
    assert [event.type for event in events] == ["tokens", "finished", "job"]
    assert text_of(events) == "All done"


def test_silence_sends_a_reader_back_to_sql(record: Record, redis_url: str) -> None:
    async def scenario() -> list[PartialEvent]:
        reading = asyncio.create_task(collect(follow(record.job_id, redis_url, record.read, poll_s=0.1)))
        await subscribed(redis_url, record.job_id)
        record.write("unheard")
        record.finish()
        return await asyncio.wait_for(reading, 10)

    assert text_of(asyncio.run(scenario())) == "unheard"


def test_a_message_that_is_no_event_is_skipped(record: Record, redis_url: str) -> None:
    async def scenario() -> list[PartialEvent]:
        reading = asyncio.create_task(collect(follow(record.job_id, redis_url, record.read)))
        await subscribed(redis_url, record.job_id)
        async with redis.asyncio.Redis.from_url(redis_url) as client:
            await client.publish(channel(record.job_id), "{broken")
        publisher = Publisher(redis_url)
        publisher.publish([record.write("fine"), *record.finish()])
        publisher.close()
        return await asyncio.wait_for(reading, 10)

    assert text_of(asyncio.run(scenario())) == "fine"


def test_a_reader_goes_on_from_sql_without_any_server(record: Record) -> None:
    record.write("alone")
    record.finish()
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    assert text_of(asyncio.run(collect(follow(record.job_id, nowhere, record.read)))) == "alone"


def test_a_restart_of_the_server_costs_a_reader_nothing(record: Record, tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"

    async def scenario() -> list[PartialEvent]:
        server = start_redis(port, tmp_path)
        publisher = Publisher(url)
        reading = asyncio.create_task(collect(follow(record.job_id, url, record.read)))
        await subscribed(url, record.job_id)
        publisher.publish([record.write("before ")])
        await asyncio.to_thread(stop, server)
        publisher.publish([record.write("meanwhile ")])
        server = await asyncio.to_thread(start_redis, port, tmp_path)
        try:
            await subscribed(url, record.job_id)
            publisher.publish([record.write("after"), *record.finish()])
            return await asyncio.wait_for(reading, 20)
        finally:
            publisher.close()
            stop(server)

    assert text_of(asyncio.run(scenario())) == "before meanwhile after"


def test_the_publisher_says_what_anyone_can_read_with_redis_cli(record: Record, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client, client.pubsub() as listener:
        listener.subscribe(f"basic:partials:{record.job_id}")
        assert listener.get_message(timeout=5) is not None
        publisher = Publisher(redis_url)
        publisher.publish([record.write("Hi")])
        message = listener.get_message(timeout=5)
        publisher.close()
    assert message is not None
    assert message["data"].startswith(f'{{"v":1,"job_id":"{record.job_id}","request":"a","index":0,"choice":0,"seq":0,')


def test_a_publisher_without_a_server_neither_waits_nor_raises(record: Record) -> None:
    publisher = Publisher(f"redis://127.0.0.1:{free_port()}/0")
    for _ in range(1000):
        publisher.publish([record.write("x")])
    publisher.close()
