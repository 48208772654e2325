"""Making a batch: a job whose requests are still to be read from an uploaded file.

Checks only the order itself; the clerk reads the file (`jobs.batch_files.processor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.errors import IdempotencyConflict, InvalidValue, NotFound
from jobs.messages import Endpoint
from jobs.settings import JobsSettings
from jobs.submission.intake import (
    check_compare_plain,
    check_idempotency_key,
    check_metadata,
    check_queue_limit,
    new_job_id,
)
from storage import files, writes
from storage.records import NewJob
from storage.session import Database

INPUT_PURPOSE = "batch"


@dataclass(frozen=True, slots=True)
class BatchSubmission:
    """A batch as someone asks for it."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: str
    window_s: float
    metadata: Any = None
    output_expires_after_s: float | None = None
    api_key_id: str = ""
    idempotency_key: str | None = None
    body_sha256: str | None = None
    traceparent: str | None = None
    compare_plain: Any = None


def create_batch(order: BatchSubmission, owner: str | None, database: Database, settings: JobsSettings) -> str:
    """Record a batch and return its id: the earlier one's, if its idempotency key has been used before.

    `owner` says whose files may be named; None: everybody's.
    """
    job = NewJob(
        id=new_job_id(),
        model="",  # said by the lines
        endpoint=order.endpoint,
        window_s=order.window_s,
        metadata=check_metadata(order.metadata),
        api_key_id=order.api_key_id,
        idempotency_key=check_idempotency_key(order.idempotency_key),
        body_sha256=order.body_sha256,
        input_file_id=order.input_file_id,
        completion_window=order.completion_window,
        output_expires_after_s=order.output_expires_after_s,
        traceparent=order.traceparent,
        compare_plain=check_compare_plain(order.compare_plain),
    )
    with database.write() as session:
        check_queue_limit(session, settings.max_requests_queued)
        file = files.file(session, order.input_file_id, owner, lock=True)
        if file is None:
            raise NotFound(f"There is no file {order.input_file_id[:80]!r}.", param="input_file_id")
        if file.purpose != INPUT_PURPOSE:
            raise InvalidValue(
                f"The purpose of the file must be {INPUT_PURPOSE}, not {file.purpose}.", param="input_file_id"
            )
        recorded = writes.insert_job(session, job, ())
    if recorded.conflict:
        raise IdempotencyConflict
    return recorded.job_id
