"""The Celery worker of a node: its one task of use is the doorbell, which wakes the engine service.

The message carries no work and is acknowledged at once; SQL says what there is to do. The first SIGTERM or SIGINT hands
everything back within the drain time, a second one ends the process at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

from celery import Celery
from celery.signals import worker_ready, worker_shutting_down
from redis import Redis
from redis.exceptions import RedisError

from jobs.celery_app import KEY_PREFIX, NOTIFY_TASK, PULSE_TASK, make_app, pulse_queue
from jobs.logs import log_context
from jobs.messages import model_queue
from jobs.producer import make_producer_app, send_pulse
from jobs.queue.worker_notifier import WorkerNotifier
from jobs.schema_check import require_schema
from jobs.tracing import start_tracing, stop_tracing
from worker.loading.loader import load_engine
from worker.serving.service import EngineService, Pulse, new_worker_id
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_PULSE_EXPIRES_S = 600
_TIMEOUT_S = 2.0


def make_worker_app(redis_url: str, model: str, service: EngineService) -> Celery:
    """Return the app of a worker that serves `model`: a node consumes only the queue of what it holds."""
    app = make_app(redis_url, queues=(model_queue(model), pulse_queue(service.worker_id)))

    @app.task(name=NOTIFY_TASK, shared=False)  # type: ignore[untyped-decorator]
    def doorbell(job_id: str) -> None:
        with log_context(job_id=job_id):
            log.debug("The doorbell rang", extra={"action": "doorbell"})
            service.wake()

    @app.task(name=PULSE_TASK, shared=False)  # type: ignore[untyped-decorator]
    def pulse() -> None:
        service.pulse_received()

    return app


def make_pulse(redis_url: str, worker_id: str) -> Pulse:
    """Return what sends a worker's message to itself. Should the worker die, the message goes with its key."""
    app = make_producer_app(redis_url)
    client = Redis.from_url(redis_url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)

    def pulse() -> bool:
        delivered = send_pulse(app, worker_id)
        try:
            client.expire(KEY_PREFIX + pulse_queue(worker_id), _PULSE_EXPIRES_S)
        except (RedisError, OSError):
            return False
        return delivered

    return pulse


def serve(settings: WorkerSettings) -> int:
    """Load the models, start the engine service, and listen for doorbells until a signal ends the process."""
    require_schema(settings.resolved_database_url)
    start_tracing("basic-worker")
    sequences = settings.max_sequences + settings.interactive_sequences
    loaded = load_engine(settings.model_copy(update={"max_sequences": sequences}), on_message=log.info)
    service = EngineService(
        settings, loaded, notify=WorkerNotifier(settings.redis_url).notify, worker_id=new_worker_id()
    )
    app = make_worker_app(settings.redis_url, loaded.name, service)

    @worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]
    def ready(**_: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # Celery would start the program anew in the midst of a step

    @worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]
    def stop(**_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end_at_once)
        service.stop()

    signal.signal(signal.SIGTERM, _leave)  # Celery's own handler comes later, and requests may be claimed before
    try:
        service.start(make_pulse(settings.redis_url, service.worker_id))
        log.info("Serving %s as %s", loaded.name, service.worker_id, extra={"action": "ready"})
        app.worker_main(["worker", "--concurrency=4", "--loglevel=INFO", f"--hostname={service.worker_id}@%h"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        service.stop()
        stop_tracing()
    return 0


def _leave(_number: int, _frame: object) -> None:
    sys.exit(0)


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    """Obey a second signal: whatever is held goes on elsewhere when its leases have lapsed."""
    os._exit(128 + number)
