"""Send to the Celery queue: prompt batches of producers inside the cluster, and notifications to workers.

Each call has a timeout of _TIMEOUT_S and raises QueueUnavailable for errors of the transport.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from jobs.celery_app import (
    INGEST_QUEUE,
    INGEST_TASK,
    NOTIFY_TASK,
    PULSE_TASK,
    make_app,
    notification_queue,
    pulse_queue,
    queue,
)
from jobs.errors import QueueUnavailable
from jobs.messages import PromptBatch
from jobs.tracing import TRACEPARENT, span, start_tracing

log = logging.getLogger(__name__)

_TIMEOUT_S = 2.0  # per connection and command; Celery's defaults are minutes

Notify = Callable[[str, str], object]  # (job_id, model)


def push(batch: PromptBatch, redis_url: str) -> str:
    """Push a prompt batch onto Redis and return its id; raise QueueUnavailable if Redis fails.

    Pushing the same id again has no effect, so push again after an error.
    """
    start_tracing("basic-producer")
    app = make_producer_app(redis_url)
    with app, span("submit", batch_id=batch.id) as traceparent:
        headers = {} if traceparent is None else {TRACEPARENT: traceparent}
        _send(app, INGEST_TASK, queue(INGEST_QUEUE), {"batch": batch.model_dump(mode="json")}, headers)
    return batch.id


def batch_job_id(batch_id: str) -> str:
    """Return the id of the job of a prompt batch, so that a producer can follow it."""
    return "batch_" + hashlib.sha256(f"prompt batch {batch_id}".encode()).hexdigest()[:32]


def notify_workers(app: Celery, job_id: str, model: str) -> bool:
    """Notify the workers of a model; return False if Redis refuses (they find the job in SQL later)."""
    try:
        _send(app, NOTIFY_TASK, notification_queue(model), {"job_id": job_id})
    except QueueUnavailable as exc:
        log.warning(
            "Could not notify the workers of job %s: %s", job_id, exc, extra={"action": "ring_failed", "job_id": job_id}
        )
        return False
    return True


def send_pulse(app: Celery, worker_id: str) -> bool:
    """Send a worker's message to itself; return False if Redis fails."""
    try:
        _send(app, PULSE_TASK, queue(pulse_queue(worker_id)), {})
    except QueueUnavailable:
        return False
    return True


def make_producer_app(redis_url: str) -> Celery:
    """Return a Celery app for sending, with short timeouts."""
    app = make_app(redis_url)
    app.conf.broker_transport_options |= {
        "socket_timeout": _TIMEOUT_S,
        "socket_connect_timeout": _TIMEOUT_S,
        # Retry once, for a connection that was lost since the last message. Kombu's default retries take 6 s.
        "max_retries": 1,
        "interval_start": 0,
    }
    return app


def _send(
    app: Celery, task: str, to: Queue, kwargs: dict[str, Any], headers: Mapping[str, str] = MappingProxyType({})
) -> None:
    try:
        app.send_task(task, kwargs=kwargs, queue=to, retry=False, ignore_result=True, headers=dict(headers))
    except (OperationalError, RedisError, OSError) as exc:
        raise QueueUnavailable(f"Can't send to the Redis server: {exc}") from exc
