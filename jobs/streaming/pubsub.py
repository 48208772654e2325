"""Partial text on pub/sub: a publisher that never holds anybody up, and a reader that never misses or doubles text.

Pub/sub may lose anything at any time; the truth is in SQL. So a reader subscribes, waits for the confirmation, is told
what SQL has, and then takes numbered events; a gap, a second confirmation (the only sign of a reconnect) or silence
sends it back to SQL.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import redis
import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.client import PubSub
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from jobs.client.event_filter import Reader
from jobs.json_lines import one_line
from jobs.messages import PartialEvent

log = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_QUEUED_BATCHES = 256  # batches of events waiting for a slow server; beyond that they are dropped, SQL has the text
_POLL_S = 5.0  # silence after which a reader looks into SQL anyway
_RETRY_S = 1.0
_SUBSCRIBE_S = 5.0  # that a server may take for it; whoever waits looks into SQL meanwhile

Confirmed = Callable[[], Awaitable[bool]]


def channel(job_id: str) -> str:
    """Return the pub/sub channel of a job."""
    return f"basic:partials:{job_id}"  # one PartialEvent as JSON a message, published after its rows are committed


class Publisher:
    """Publishes events from a thread of its own: neither a slow nor a dead server holds the caller up."""

    def __init__(self, redis_url: str) -> None:
        """Start the thread; the server is first contacted when there is something to say."""
        self._client = redis.Redis.from_url(
            redis_url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 1),  # one new connection after a restart of the server, no waiting
        )
        self._batches: queue.Queue[Sequence[PartialEvent] | None] = queue.Queue(_QUEUED_BATCHES)
        self._reachable = True
        self._thread = threading.Thread(target=self._run, name="partials", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[PartialEvent]) -> None:
        """Hand over events that are committed. Returns at once and never raises."""
        if not events:
            return
        try:
            self._batches.put_nowait(events)
        except queue.Full:
            log.warning(
                "Dropped %d partial events: the queue is full", len(events), extra={"action": "partials_dropped"}
            )

    def close(self, timeout_s: float = 2 * _TIMEOUT_S) -> None:
        """Send what is waiting, as far as the time allows, and end the thread."""
        try:
            self._batches.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (events := self._batches.get()) is not None:
            try:
                self._send(events)
            except Exception:  # the texts of others are published by this thread, too
                log.exception("Partial events can't be told", extra={"action": "partials_failed"})
        self._client.close()

    def _send(self, events: Sequence[PartialEvent]) -> None:
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                for event in events:
                    pipeline.publish(
                        channel(event.job_id), one_line(event.model_dump_json(exclude_none=True, exclude={"snapshot"}))
                    )
                pipeline.execute()
        except (RedisError, OSError) as exc:
            self._note(reachable=False, why=exc)
        else:
            self._note(reachable=True)

    def _note(self, *, reachable: bool, why: Exception | None = None) -> None:
        """Log a change of state once, not every half second of an outage."""
        if self._reachable and not reachable:
            log.warning("Partial events can't be published: %s", why, extra={"action": "partials_down"})
        if reachable and not self._reachable:
            log.info("Partial events are published again", extra={"action": "partials_up"})
        self._reachable = reachable


async def follow(
    job_id: str, redis_url: str, read: Callable[[], Sequence[PartialEvent]], *, poll_s: float = _POLL_S
) -> AsyncGenerator[PartialEvent]:
    """Yield the events of a job until its status is final: first what has been written, then what is being written.

    `read` tells the story so far from SQL (see `snapshots.read_events`) and is called in a thread. Without Redis it is
    called again and again, and all text comes in snapshots.
    """
    reader = Reader()
    async with aclosing(signals(redis_url, job_id, poll_s)) as heard_here:
        async for signal in heard_here:
            heard = signal is not None and reader.follows(signal)
            events = [signal] if heard and signal is not None else await asyncio.to_thread(read)
            for event in events:
                if reader.take(event):
                    yield event
            if not events or _is_end(events[-1]):
                return


def _is_end(event: PartialEvent) -> bool:
    return event.status is not None and event.status.final


async def signals(redis_url: str, job_id: str, poll_s: float) -> AsyncGenerator[PartialEvent | None]:
    """Yield published events, and None whenever it is time to look into SQL. Survives the loss of the server."""
    while True:
        try:
            async with _subscription(redis_url, job_id) as (subscription, confirmed):
                while not await confirmed():
                    yield None
                while True:
                    yield _event(await subscription.get_message(timeout=poll_s))
        except (RedisError, OSError) as exc:
            log.debug("No events for job %s: %s", job_id, exc, extra={"action": "follow_down", "job_id": job_id})
            yield None
            await asyncio.sleep(_RETRY_S)


@asynccontextmanager
async def _subscription(redis_url: str, job_id: str) -> AsyncIterator[tuple[PubSub, Confirmed]]:
    """Yield a subscription, and what waits a little for the server to take it and tells whether it has."""
    client = redis.asyncio.Redis.from_url(
        redis_url, socket_connect_timeout=_TIMEOUT_S, socket_keepalive=True, health_check_interval=10
    )
    async with client, client.pubsub() as subscription:
        subscribing = asyncio.ensure_future(asyncio.wait_for(subscription.subscribe(channel(job_id)), _SUBSCRIBE_S))

        async def confirmed() -> bool:
            await asyncio.wait({subscribing}, timeout=_RETRY_S)
            if subscribing.done():
                subscribing.result()  # raises what went wrong
            return subscribing.done()

        try:
            yield subscription, confirmed
        finally:
            subscribing.cancel()
            await asyncio.gather(subscribing, return_exceptions=True)


def _event(message: dict[str, Any] | None) -> PartialEvent | None:
    """Return the event in a message; None for silence, for a confirmation, and for what we can't read."""
    if message is None or message["type"] != "message":
        return None
    try:
        return PartialEvent.model_validate_json(message["data"])
    except ValidationError:
        log.warning("Skipped a message that is no partial event", extra={"action": "unreadable_event"})
        return None
