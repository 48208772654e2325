"""The Celery worker of a node. Its notify task wakes the engine service.

A message carries no work and is acknowledged at once; the database holds the work. The first SIGTERM or SIGINT releases
all requests within the drain time, a second one exits at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

import torch
from celery import Celery
from celery.signals import worker_ready, worker_shutting_down
from redis import Redis
from redis.exceptions import RedisError

from jobs.celery_app import KEY_PREFIX, NOTIFY_TASK, PULSE_TASK, make_app, pulse_queue
from jobs.logs import log_context
from jobs.messages import model_queue
from jobs.processes import RESTART_STATUS
from jobs.producer import make_producer_app, send_pulse
from jobs.queue.worker_notifier import WorkerNotifier
from jobs.schema_check import require_schema
from jobs.tracing import start_tracing, stop_tracing
from worker.loading.loader import load_engine
from worker.loading.rank_processes import RankProcesses
from worker.serving.garbage import exempt_loaded_objects
from worker.serving.request_process import RequestProcess
from worker.serving.service import EngineService, Pulse, new_worker_id
from worker.settings import WorkerSettings
from worker.sharing.access import DeviceAccess

log = logging.getLogger(__name__)

_PULSE_EXPIRES_S = 600
_REDIS_TIMEOUT_S = 2.0
_STARTING = {"action": "load"}


def make_worker_app(redis_url: str, model: str, service: EngineService) -> Celery:
    """Return the Celery app of a worker; it consumes only the queues of its model and of its own pulses."""
    app = make_app(redis_url, queues=(model_queue(model), pulse_queue(service.worker_id)))

    @app.task(name=NOTIFY_TASK, shared=False)  # type: ignore[untyped-decorator]
    def notify(job_id: str) -> None:
        with log_context(job_id=job_id):
            log.debug("Notified of job %s", job_id, extra={"action": "doorbell"})
            service.wake()

    @app.task(name=PULSE_TASK, shared=False)  # type: ignore[untyped-decorator]
    def pulse() -> None:
        service.pulse_received()

    return app


def make_pulse(redis_url: str, worker_id: str) -> Pulse:
    """Return the function that sends a worker's pulse to itself. Its queue expires if the worker dies."""
    app = make_producer_app(redis_url)
    client = Redis.from_url(redis_url, socket_timeout=_REDIS_TIMEOUT_S, socket_connect_timeout=_REDIS_TIMEOUT_S)

    def pulse() -> bool:
        delivered = send_pulse(app, worker_id)
        try:
            client.expire(KEY_PREFIX + pulse_queue(worker_id), _PULSE_EXPIRES_S)
        except (RedisError, OSError):
            return False
        return delivered

    return pulse


def serve(settings: WorkerSettings, access: DeviceAccess, processes: RankProcesses | None) -> int:
    """Load the models, start the engine service, and receive notifications until a signal.

    `processes` are those of the other ranks of a replica of several.
    """
    require_schema(settings.resolved_database_url)
    start_tracing("basic-worker")
    requests = RequestProcess()  # it imports its modules while the models are loaded
    try:
        loaded = load_engine(_with_interactive(settings), log.info, access, processes)
    except torch.OutOfMemoryError as error:
        requests.kill()  # a restart may help: a process that was killed frees its memory a little later
        reason = str(error).splitlines()[0]
        log.error("%s does not fit into the memory of the device: %s", settings.target, reason, extra=_STARTING)
        return RESTART_STATUS
    except BaseException:
        requests.kill()
        raise
    service = EngineService(
        settings, loaded, WorkerNotifier(settings.redis_url).notify, requests, access, worker_id=new_worker_id()
    )
    app = make_worker_app(settings.redis_url, loaded.name, service)

    @worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]
    def ready(**_: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # Celery would restart the process in the middle of a step

    @worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]
    def stop(**_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _exit_at_once)
        service.stop()

    signal.signal(signal.SIGTERM, _exit_normally)  # Celery installs its handler later; requests may be claimed before
    try:
        exempt_loaded_objects()
        service.start(make_pulse(settings.redis_url, service.worker_id))
        log.info("Serving %s as %s", loaded.name, service.worker_id, extra={"action": "ready"})
        app.worker_main(["worker", "--concurrency=4", "--loglevel=INFO", f"--hostname={service.worker_id}@%h"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        service.stop()
        stop_tracing()
    return 0


def _with_interactive(settings: WorkerSettings) -> WorkerSettings:
    """Return the settings with the interactive sequences added to a chosen number; a derived one includes them."""
    sequences = settings.max_sequences and settings.max_sequences + settings.interactive_sequences
    return settings.model_copy(update={"max_sequences": sequences})


def _exit_normally(_number: int, _frame: object) -> None:
    sys.exit(0)


def _exit_at_once(number: int, _frame: FrameType | None) -> None:
    """Exit on a second signal; other workers continue the requests when their leases expire."""
    os._exit(128 + number)
