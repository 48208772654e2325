"""Publish partial text on Redis pub/sub without blocking, and subscribe to the messages of a job.

Pub/sub may lose messages at any time; the truth is in SQL. So a subscriber must read SQL after each confirmed
subscription (the only sign of a reconnect) and after silence.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis
import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.client import PubSub
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from jobs.json_lines import one_line
from jobs.messages import PartialEvent

log = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_QUEUED_BATCHES = 256  # batches of events that wait for a slow server; more are dropped, since SQL has the text
_POLL_S = 5.0  # read SQL after this much silence
_RETRY_S = 1.0
_SUBSCRIBE_S = 5.0  # timeout of a subscription; readers poll SQL meanwhile

Confirmed = Callable[[], Awaitable[bool]]


def channel(job_id: str) -> str:
    """Return the pub/sub channel of a job."""
    return f"basic:partials:{job_id}"  # each message is a PartialEvent as JSON, published after its commit


class Publisher:
    """Publishes events from a background thread, so that a slow or dead server never blocks the caller."""

    def __init__(self, redis_url: str) -> None:
        """Start the thread; connect with the first event."""
        self._client = redis.Redis.from_url(
            redis_url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 1),  # reconnect once, without delay: the server may have restarted
        )
        self._batches: queue.Queue[Sequence[PartialEvent] | None] = queue.Queue(_QUEUED_BATCHES)
        self._reachable = True
        self._thread = threading.Thread(target=self._run, name="partials", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[PartialEvent]) -> None:
        """Publish committed events in the background. Never block and never raise."""
        if not events:
            return
        try:
            self._batches.put_nowait(events)
        except queue.Full:
            log.warning(
                "Dropped %d partial events: the queue is full", len(events), extra={"action": "partials_dropped"}
            )

    def close(self, timeout_s: float = 2 * _TIMEOUT_S) -> None:
        """Publish what is queued, within the timeout, and stop the thread."""
        try:
            self._batches.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (events := self._batches.get()) is not None:
            try:
                self._send(events)
            except Exception:  # other jobs need this thread too
                log.exception("Publishing partial events failed", extra={"action": "partials_failed"})
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
        """Log an outage once when it begins and once when it ends."""
        if self._reachable and not reachable:
            log.warning("Can't publish partial events: %s", why, extra={"action": "partials_down"})
        if reachable and not self._reachable:
            log.info("Publishing partial events again", extra={"action": "partials_up"})
        self._reachable = reachable


async def subscribe(redis_url: str, job_id: str, poll_s: float) -> AsyncGenerator[PartialEvent | None]:
    """Yield published events, and None when the reader must read SQL. Reconnect after connection loss."""
    while True:
        try:
            async with _subscription(redis_url, job_id) as (subscription, confirmed):
                while not await confirmed():
                    yield None
                while True:
                    yield _event(await subscription.get_message(timeout=poll_s))
        except (RedisError, OSError) as exc:
            log.debug(
                "Lost the subscription of job %s: %s", job_id, exc, extra={"action": "follow_down", "job_id": job_id}
            )
            yield None
            await asyncio.sleep(_RETRY_S)


@asynccontextmanager
async def _subscription(redis_url: str, job_id: str) -> AsyncIterator[tuple[PubSub, Confirmed]]:
    """Yield a subscription, and a function that waits up to _RETRY_S for its confirmation and returns success."""
    client = redis.asyncio.Redis.from_url(
        redis_url, socket_connect_timeout=_TIMEOUT_S, socket_keepalive=True, health_check_interval=10
    )
    async with client, client.pubsub() as subscription:
        subscribing = asyncio.ensure_future(asyncio.wait_for(subscription.subscribe(channel(job_id)), _SUBSCRIBE_S))

        async def confirmed() -> bool:
            await asyncio.wait({subscribing}, timeout=_RETRY_S)
            if subscribing.done():
                subscribing.result()  # raise its error, if any
            return subscribing.done()

        try:
            yield subscription, confirmed
        finally:
            subscribing.cancel()
            await asyncio.gather(subscribing, return_exceptions=True)


def _event(message: dict[str, Any] | None) -> PartialEvent | None:
    """Return the event in a message; None for a timeout, a confirmation, or an invalid message."""
    if message is None or message["type"] != "message":
        return None
    try:
        return PartialEvent.model_validate_json(message["data"])
    except ValidationError:
        log.warning("Skipped a pub/sub message that is not a partial event", extra={"action": "unreadable_event"})
        return None
