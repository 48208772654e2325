"""The Celery app: names of tasks and queues, and the settings under which Celery on Redis can be trusted.

A doorbell says "there may be work"; it carries no work and its loss is harmless. Only the ingest queue carries data,
and only until its rows are committed. Knows no SQL and registers no task: those who have a task body register it, not
shared, for Celery would give it to every other app of the process too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.entity import Exchange, Queue

from jobs.messages import model_queue

NOTIFY_TASK = "basic.doorbell"  # kwargs: job_id
INGEST_TASK = "basic.ingest"  # kwargs: batch, a PromptBatch as JSON
INGEST_QUEUE = "basic.ingest"
PULSE_TASK = "basic.pulse"  # no arguments; on a worker's own queue, to learn whether it still hears

# Every key that Celery makes in Redis starts so; `basic:basic.ingest` and `basic:basic.model.*` are lists of messages,
# `basic:basic.pulse.*` what workers send to themselves, for ten minutes at most,
# `basic:unacked*` the messages in delivery, `basic:_kombu.binding.*` and `basic:/0.*` Celery's own wiring,
# `basic:probe` a look whether a server that refused to write does so again (jobs.queue.redis_transport).
KEY_PREFIX = "basic:"

_SOCKET_TIMEOUT_S = 5.0


def make_app(redis_url: str, queues: Sequence[str] = ()) -> Celery:
    """Return an app on this server. A consumer names its `queues`; a producer needs none."""
    app = Celery("basic", broker=_verifying(redis_url), set_as_current=False)
    app.conf.update(_settings())
    app.conf.task_queues = tuple(queue(name) for name in queues)
    return app


def queue(name: str) -> Queue:
    """Return a queue on the default exchange: a message reaches its list even if the server forgot all bindings."""
    return Queue(name, Exchange(""), routing_key=name)  # type: ignore[no-untyped-call]


def notification_queue(model: str) -> Queue:
    """Return the queue on which doorbells for a model ring."""
    return queue(model_queue(model))


def pulse_queue(worker_id: str) -> str:
    """Return the queue on which a worker sends messages to itself. Its list expires with the worker."""
    return f"basic.pulse.{worker_id}"


def _verifying(redis_url: str) -> str:
    """Return the URL with what redis-py takes for granted: kombu would accept any certificate unless told not to."""
    if not redis_url.startswith("rediss://") or "ssl_cert_reqs=" in redis_url:
        return redis_url
    return f"{redis_url}{'&' if '?' in redis_url else '?'}ssl_cert_reqs=required"


def _settings() -> dict[str, Any]:
    return {
        "broker_transport": "jobs.queue.redis_transport:Transport",
        "broker_channel_error_retry": True,  # what a server refuses is no reason to end
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a server that comes back after an hour is still our server
        "broker_transport_options": _transport_options(),
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_ignore_result": True,  # results live in SQL; a result backend would leave a key per task for a day
        "task_acks_late": False,
        "task_create_missing_queues": False,
        "task_publish_retry": False,
        "worker_pool": "threads",  # a prefork child could hold neither CUDA nor the one resident engine
        "worker_prefetch_multiplier": 1,
        "worker_enable_remote_control": True,  # its pub/sub socket is what notices a lost connection
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }


def _transport_options() -> dict[str, Any]:
    return {
        "global_keyprefix": KEY_PREFIX,
        "visibility_timeout": 300,  # messages live for milliseconds; short, so that a dead consumer's come back soon
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,  # with the defaults the sweep comes only every 100 s
        "socket_timeout": _SOCKET_TIMEOUT_S,
        "socket_connect_timeout": _SOCKET_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }
