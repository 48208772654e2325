"""The ingest process, `python -m jobs.ingest`: turn pushed prompt batches and batch files into requests in SQL.

One thread stores the prompt batches from Redis with late acknowledgement: a message leaves Redis only when its rows are
committed, and storing it twice has no effect. The concurrency is fixed at 1, because Celery's late acknowledgement with
several threads does not survive a restart of Redis.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from celery import Celery, Task
from celery.exceptions import Reject
from pydantic import ValidationError

from jobs.batch_files.processor import BatchFileProcessor
from jobs.celery_app import INGEST_QUEUE, INGEST_TASK, make_app
from jobs.errors import BasicError, IdempotencyConflict, InvalidJsonLine, InvalidValue, LimitReached
from jobs.logs import log_to_stderr
from jobs.messages import PromptBatch
from jobs.producer import Notify, batch_job_id
from jobs.queue.worker_notifier import WorkerNotifier
from jobs.schema_check import exit_status, require_schema
from jobs.settings import JobsSettings, read_settings
from jobs.streaming.pubsub import Publisher
from jobs.submission.intake import Submission, create_failed_job, create_job
from jobs.submission.items import Item, read_value
from jobs.submission.managed.fields import Managed
from jobs.tracing import TRACEPARENT, as_traceparent, start_tracing, stop_tracing
from storage.dialect import storable
from storage.records import RequestFailure
from storage.session import DATABASE_UNAVAILABLE, LONG_STATEMENT_TIMEOUT_S, Database, unavailable_reason

log = logging.getLogger("jobs.ingest")  # __name__ is __main__ here

_PROCESSOR_STOP_S = 5.0
_RETRY_S = 2.0  # delay before a message is requeued while the database is down
_KEY_PREFIX = "producer:"  # separates ids of producers from Idempotency-Keys of HTTP clients


def ingest(
    batch: Any, *, database: Database, notify: Notify, settings: JobsSettings, traceparent: str | None = None
) -> str | None:
    """Store a prompt batch as a job and return the job's id; None if the batch has no valid id."""
    try:
        submission = _read(batch)
    except (ValidationError, RecursionError) as exc:
        return _refuse_unreadable(batch, exc, database, settings)
    submission = replace(submission, traceparent=traceparent)
    batch_id = str(batch["id"])
    try:
        job_id = create_job(submission, database=database, notify=notify, settings=settings)
    except IdempotencyConflict:
        log.error("Ignored batch %s: it was pushed before with other content", batch_id, extra=_ids(batch_id))
        return submission.job_id
    except LimitReached:
        raise
    except BasicError as refused:
        return _refuse(submission, batch_id, refused, database, settings)
    log.info("Stored batch %s as job %s", batch_id, job_id, extra=_ids(batch_id) | {"job_id": job_id})
    return job_id


def make_ingest_app(
    database: Database, settings: JobsSettings, *, sleep: Callable[[float], None] = time.sleep
) -> Celery:
    """Return the Celery app with the ingest task registered."""
    app = make_app(settings.redis_url, queues=(INGEST_QUEUE,))
    notify = WorkerNotifier(settings.redis_url).notify

    @app.task(name=INGEST_TASK, bind=True, acks_late=True, shared=False)  # type: ignore[untyped-decorator]
    def ingest_task(task: Task, batch: Any) -> None:
        try:
            traceparent = as_traceparent(task.request.get(TRACEPARENT))
            ingest(batch, database=database, notify=notify, settings=settings, traceparent=traceparent)
        except (*DATABASE_UNAVAILABLE, LimitReached) as exc:
            log.warning("Requeueing a batch: %s", unavailable_reason(exc), extra={"action": "requeue"})
            sleep(_RETRY_S)
            raise Reject(exc, requeue=True) from exc

    return app


def main() -> int:
    """Run the ingest process until a signal stops it."""
    try:
        settings = read_settings(JobsSettings)
        log_to_stderr(settings.log_format)
        start_tracing("basic-ingest")
        require_schema(settings.resolved_database_url)
    except BasicError as exc:
        print(exc, file=sys.stderr)
        return exit_status(exc)
    database = Database.open(settings.resolved_database_url, statement_timeout_s=LONG_STATEMENT_TIMEOUT_S)
    app = make_ingest_app(database, settings)
    try:
        with run_processors(database, settings):
            app.worker_main(["worker", "--pool=threads", "--concurrency=1", "--loglevel=INFO", "--hostname=ingest@%h"])
    finally:
        database.dispose()
        stop_tracing()
    return 0


@contextmanager
def run_processors(database: Database, settings: JobsSettings, count: int = 2) -> Iterator[None]:
    """Process batch files in `count` threads inside the block: with two, small batches don't wait for a large one."""
    stop = threading.Event()
    publisher = Publisher(settings.redis_url)
    processor = BatchFileProcessor(
        database, settings, WorkerNotifier(settings.redis_url).notify, publisher.publish, stop
    )
    threads = [threading.Thread(target=processor.run, name=f"batch-files-{n}", daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(_PROCESSOR_STOP_S)
        publisher.close()


def _read(batch: Any) -> Submission:
    """Return the submission in a message; raise ValidationError if it is not a batch.

    A request that is not strict JSON (lone surrogates, NaN) fails alone.
    """
    text = json.dumps(batch)
    try:
        read = PromptBatch.model_validate_json(text)
        return _submission(read, [Item(index, value) for index, value in enumerate(read.requests)])
    except ValidationError:
        if not isinstance(batch, dict) or not isinstance(batch.get("requests"), list):
            raise
        items = [read_value(index, value) for index, value in enumerate(batch["requests"])]
        if not any(isinstance(item.value, InvalidJsonLine) for item in items):
            raise
    rest = json.dumps(batch | {"requests": [None] * len(items)})
    submission = _submission(PromptBatch.model_validate_json(rest), items)
    return replace(submission, body_sha256=hashlib.sha256(text.encode()).hexdigest())


def _submission(batch: PromptBatch, items: list[Item]) -> Submission:
    return Submission(
        items=items,
        model=batch.model,
        endpoint=batch.endpoint,
        parameters=batch.parameters,
        metadata=batch.metadata,
        managed=Managed(batch.name, batch.labels, batch.priority, batch.max_concurrent, batch.budget),
        compare_plain=batch.compare_plain,
        job_id=batch_job_id(batch.id),
        idempotency_key=_KEY_PREFIX + batch.id,
        body_sha256=hashlib.sha256(batch.model_dump_json().encode()).hexdigest(),
    )


def _refuse(
    submission: Submission, batch_id: str, refused: BasicError, database: Database, settings: JobsSettings
) -> str:
    log.warning("Rejected batch %s: %s", batch_id, refused, extra=_ids(batch_id))
    param = refused.param and storable(refused.param)
    failure = RequestFailure(refused.code or "invalid_value", storable(str(refused)), param, refused.status_code)
    return create_failed_job(submission, failure, database=database, settings=settings)


def _refuse_unreadable(
    batch: Any, exc: ValidationError | RecursionError, database: Database, settings: JobsSettings
) -> str | None:
    """Store a failed job for a message that is not a PromptBatch; return None if it has no valid id."""
    param, message = "batch", "Its lists and objects are nested too deep."
    if isinstance(exc, ValidationError):
        first = exc.errors(include_url=False, include_input=False)[0]
        param, message = ".".join(str(part) for part in first["loc"]) or "batch", first["msg"]
    batch_id = batch.get("id") if isinstance(batch, dict) else None
    if not isinstance(batch_id, str) or not 1 <= len(batch_id) <= 128 or batch_id != storable(batch_id):
        log.error("Dropped a prompt batch without a valid id: %s: %s", param, message, extra={"action": "dropped"})
        return None
    submission = Submission((), job_id=batch_job_id(batch_id), idempotency_key=_KEY_PREFIX + batch_id)
    return _refuse(submission, batch_id, InvalidValue(message, param=param), database, settings)


def _ids(batch_id: str) -> dict[str, str]:
    return {"action": "ingest", "batch_id": batch_id}


if __name__ == "__main__":
    sys.exit(main())
