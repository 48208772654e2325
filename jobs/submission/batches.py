"""Create a batch: a job whose requests `jobs.batch_files.processor` reads from an uploaded file later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.errors import IdempotencyConflict, InvalidValue, NotFound
from jobs.messages import Endpoint
from jobs.settings import JobsSettings
from jobs.submission.intake import (
    check_compare_plain,
    check_idempotency_key,
    check_queue_limit,
    new_job_id,
)
from jobs.submission.managed.fields import NOTHING_MANAGED, Managed
from storage import files, writes
from storage.records import NewJob
from storage.session import Database

INPUT_PURPOSE = "batch"


@dataclass(frozen=True, slots=True)
class BatchSubmission:
    """A batch as the caller submits it, not validated yet."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: str
    window_s: float
    metadata: Any = None
    managed: Managed = NOTHING_MANAGED  # name, labels, priority, concurrency limit
    output_expires_after_s: float | None = None
    api_key_id: str = ""
    idempotency_key: str | None = None
    body_sha256: str | None = None
    traceparent: str | None = None
    compare_plain: Any = None


def create_batch(batch: BatchSubmission, owner: str | None, database: Database, settings: JobsSettings) -> str:
    """Store a batch and return its id, or the id of the earlier batch with the same idempotency key.

    `owner` is the key whose files may be used; None: all files.
    """
    job = NewJob(
        id=new_job_id(),
        model="",  # the lines of the file name it
        endpoint=batch.endpoint,
        window_s=batch.window_s,
        **batch.managed.columns(batch.metadata),
        api_key_id=batch.api_key_id,
        idempotency_key=check_idempotency_key(batch.idempotency_key),
        body_sha256=batch.body_sha256,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        output_expires_after_s=batch.output_expires_after_s,
        traceparent=batch.traceparent,
        compare_plain=check_compare_plain(batch.compare_plain),
    )
    with database.write() as session:
        check_queue_limit(session, settings.max_requests_queued)
        file = files.file(session, batch.input_file_id, owner, lock=True)
        if file is None:
            raise NotFound(f"There is no file {batch.input_file_id[:80]!r}.", param="input_file_id")
        if file.purpose != INPUT_PURPOSE:
            raise InvalidValue(
                f"The purpose of the file must be {INPUT_PURPOSE}, not {file.purpose}.", param="input_file_id"
            )
        recorded = writes.insert_job(session, job, ())
    if recorded.conflict:
        raise IdempotencyConflict
    return recorded.job_id
