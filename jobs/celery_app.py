"""The Celery app: names of tasks and queues, and settings that make Celery reliable on Redis.

A notification says "there may be work": it carries no data, and losing one is harmless. Only the ingest queue carries
data, until its rows are committed. Register tasks with `shared=False` where their bodies are, because Celery adds
shared tasks to every app of the process.
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
PULSE_TASK = "basic.pulse"  # no kwargs; a worker sends it to its own queue to check that its consumer works

# Prefix of all keys of Celery in Redis:
#   basic:basic.ingest, basic:basic.model.*    queues (lists of messages)
#   basic:basic.pulse.*                        queues of workers' messages to themselves; expire after 10 minutes
#   basic:unacked*                             messages in delivery
#   basic:_kombu.binding.*, basic:/0.*         bindings
#   basic:probe                                test writes of jobs.queue.redis_transport
KEY_PREFIX = "basic:"

_SOCKET_TIMEOUT_S = 5.0


def make_app(redis_url: str, queues: Sequence[str] = ()) -> Celery:
    """Return a Celery app for a Redis server. Only a consumer needs `queues`."""
    app = Celery("basic", broker=_verifying(redis_url), set_as_current=False)
    app.conf.update(_settings())
    app.conf.task_queues = tuple(queue(name) for name in queues)
    return app


def queue(name: str) -> Queue:
    """Return a queue on the default exchange, which works without bindings, for example after a FLUSHALL."""
    return Queue(name, Exchange(""), routing_key=name)  # type: ignore[no-untyped-call]


def notification_queue(model: str) -> Queue:
    """Return the queue for notifications of a model."""
    return queue(model_queue(model))


def pulse_queue(worker_id: str) -> str:
    """Return the name of the queue on which a worker sends messages to itself."""
    return f"basic.pulse.{worker_id}"


def _verifying(redis_url: str) -> str:
    """Return a `rediss://` URL with certificate checks required, because kombu's default is to accept any."""
    if not redis_url.startswith("rediss://") or "ssl_cert_reqs=" in redis_url:
        return redis_url
    return f"{redis_url}{'&' if '?' in redis_url else '?'}ssl_cert_reqs=required"


def _settings() -> dict[str, Any]:
    return {
        "broker_transport": "jobs.queue.redis_transport:Transport",
        "broker_channel_error_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # wait for the server forever
        "broker_transport_options": _transport_options(),
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_ignore_result": True,  # results are in SQL; a result backend would keep one key per task for a day
        "task_acks_late": False,
        "task_create_missing_queues": False,
        "task_publish_retry": False,
        "worker_pool": "threads",  # CUDA does not survive the fork of a prefork pool
        "worker_prefetch_multiplier": 1,
        "worker_enable_remote_control": True,  # its pub/sub socket detects a lost connection
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }


def _transport_options() -> dict[str, Any]:
    return {
        "global_keyprefix": KEY_PREFIX,
        "visibility_timeout": 300,  # seconds until the messages of a dead consumer are delivered again
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,  # by default, restoring runs only every 100 s
        "socket_timeout": _SOCKET_TIMEOUT_S,
        "socket_connect_timeout": _SOCKET_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }
