"""The Celery worker of a node: its one task is the doorbell, which wakes the resident engine.

Celery -> [tasks] -> resident.  The message carries no work and is acknowledged at once; SQL says what there is to do.
"""

from __future__ import annotations

import logging
import sys

from celery import Celery
from celery.signals import worker_shutting_down

from jobs.celery_app import DOORBELL_TASK, make_app
from jobs.errors import BasicError
from jobs.logs import log_to_stderr
from jobs.messages import model_queue
from jobs.producer import make_producer_app, ring
from worker.assembly import assemble
from worker.engine.errors import EngineError
from worker.resident import Resident
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)


def make_worker_app(redis_url: str, model: str, resident: Resident) -> Celery:
    """Return the app of a worker that serves `model`: a node consumes only the queue of what it holds."""
    app = make_app(redis_url, queues=(model_queue(model),))

    @app.task(name=DOORBELL_TASK)  # type: ignore[untyped-decorator]
    def doorbell(job_id: str) -> None:
        log.debug("The doorbell rang for job %s", job_id, extra={"action": "doorbell", "job_id": job_id})
        resident.wake()

    return app


def serve(settings: WorkerSettings) -> int:
    """Load the models, start the resident engine, and listen for doorbells until a signal ends the process."""
    sequences = settings.max_sequences + settings.interactive_sequences
    assembly = assemble(settings.model_copy(update={"max_sequences": sequences}), say=log.info)
    bells = make_producer_app(settings.redis_url)
    resident = Resident(settings, assembly, ring=lambda job_id, model: ring(bells, job_id, model))
    app = make_worker_app(settings.redis_url, assembly.name, resident)

    @worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]
    def stop(**_: object) -> None:
        resident.stop()

    resident.start()
    log.info("Serving %s as %s", assembly.name, resident.worker_id, extra={"action": "ready"})
    try:
        app.worker_main(["worker", "--concurrency=4", "--loglevel=INFO", f"--hostname={resident.worker_id}@%h"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        resident.stop()
    return 0


def run(settings: WorkerSettings) -> int:
    """Serve, and turn what the settings got wrong into one sentence and an exit status that means: don't restart."""
    log_to_stderr(settings.log_format)
    try:
        return serve(settings)
    except (BasicError, EngineError) as error:
        print(error, file=sys.stderr)
        return 78


def main() -> int:
    """Run a worker with the settings of the environment: `python -m worker`."""
    return run(WorkerSettings())
