"""Writes: insert jobs and update workers. Each function takes a session in a write transaction, and may be repeated.

Re-exports the flush (storage.progress.flush) and the transitions (storage.transitions).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningInsert

from storage.dialect import database_now, dialect_of, insert_into, insert_many, insert_or_ignore
from storage.keys import enforce_limits
from storage.labels import index_job
from storage.models import JobRow, Request, Worker, WorkerEnergy
from storage.progress.flush import flush
from storage.records import NewJob, NewRequest, NewWorker
from storage.transitions import Ended, end_finished_jobs, end_jobs, error_columns, expire_requests, request_cancel

__all__ = [
    "Ended",
    "InsertedJob",
    "add_energy",
    "end_finished_jobs",
    "end_jobs",
    "expire_requests",
    "flush",
    "insert_job",
    "mark_stopped",
    "record_heartbeat",
    "register_worker",
    "request_cancel",
    "request_row",
    "update_calibration",
    "update_load",
]

_MAX_CHUNK_ROWS: Final = 1_000
_MAX_CHUNK_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class InsertedJob:
    """Id of the stored job: the new one, or the earlier one with the same idempotency key."""

    job_id: str
    created: bool  # False: the idempotency key or the id is taken; nothing was written
    conflict: bool = False  # taken by a submission with another body


def insert_job(session: Session, job: NewJob, requests: Iterable[NewRequest]) -> InsertedJob:
    """Insert a job and its requests. Requests are consumed once, in chunks; rejected ones are stored as failed.

    A submission with a known idempotency key returns the first submission's job. A job without a valid request ends at
    once. Raise QuotaExceeded if the job exceeds the limits of its API key.
    """
    now = database_now(session)
    chunks = _in_chunks(requests)
    first, second = next(chunks, ()), next(chunks, None)
    counts = _counted(first, _NO_REQUESTS)  # most jobs have a single chunk
    if session.execute(_new_job(dialect_of(session)), _job_row(job, now) | counts).first() is None:
        return _earlier_job(session, job)
    if not job.priority:
        index_job(session, job.id, now, job.name, job.metadata)
    if first:
        insert_many(session, Request, [request_row(job.id, index, request, now) for index, request in first])
    if second is not None:
        for chunk in chain([second], chunks):
            insert_many(session, Request, [request_row(job.id, index, request, now) for index, request in chunk])
            counts = _counted(chunk, counts)
        session.execute(update(JobRow).where(JobRow.id == job.id).values(counts))
    if counts["requests_failed"] == counts["requests_total"]:
        end_finished_jobs(session, [job.id])
    enforce_limits(session, job.api_key_id or "")
    return InsertedJob(job.id, created=True)


def register_worker(session: Session, card: NewWorker) -> None:
    """Insert a worker that is ready to serve."""
    now = database_now(session)
    session.execute(insert_or_ignore(session, Worker).values(**asdict(card), started_at=now, last_seen_at=now))


def record_heartbeat(session: Session, worker_id: str) -> None:
    """Update `last_seen_at` of a worker; if it was marked lost, it no longer is."""
    _update_worker(session, worker_id, last_seen_at=database_now(session), lost_at=None)


def update_calibration(session: Session, worker_id: str, calibration: Mapping[str, Any]) -> None:
    """Replace the measured cost curves of a worker."""
    _update_worker(session, worker_id, calibration=dict(calibration))


def update_load(session: Session, worker_id: str, load: Mapping[str, Any]) -> None:
    """Replace the reported load of a worker."""
    _update_worker(session, worker_id, load=dict(load))


def add_energy(session: Session, worker_id: str, at: float, joules: float) -> None:
    """Add the energy of a worker's devices to the minute of `at` (Unix seconds)."""
    added = insert_into(session, WorkerEnergy).values(worker_id=worker_id, minute=int(at // 60) * 60, joules=joules)
    more = {"joules": WorkerEnergy.joules + added.excluded.joules}
    session.execute(added.on_conflict_do_update(index_elements=["worker_id", "minute"], set_=more))


def mark_stopped(session: Session, worker_id: str) -> None:
    """Mark a clean shutdown of a worker."""
    now = database_now(session)
    _update_worker(session, worker_id, last_seen_at=now, stopped_at=now)


def _update_worker(session: Session, worker_id: str, **columns: Any) -> None:
    session.execute(update(Worker).where(Worker.id == worker_id).values(**columns))


@cache
def _new_job(dialect: str) -> ReturningInsert[Any]:
    """Return the INSERT of a new job. Cached, because building it costs more than running it."""
    table: Any = JobRow.__table__
    insert = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    return insert.on_conflict_do_nothing().returning(table.c.id)


def _job_row(job: NewJob, now: float) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": "in_progress" if job.input_file_id is None else "validating",
        "model": job.model,
        "endpoint": job.endpoint,
        "created_at": now,
        "expires_at": now + job.window_s,
        "requests_total": 0,
        "requests_completed": 0,
        "requests_failed": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "metadata": None if job.metadata is None else dict(job.metadata),
        "api_key_id": job.api_key_id or "",
        "idempotency_key": job.idempotency_key,
        "body_sha256": job.body_sha256,
        "priority": job.priority,
        "name": job.name,
        "priority_class": job.priority_class,
        "max_concurrent": job.max_concurrent,
        "budget_tokens": job.budget_tokens,
        "budget_s": job.budget_s,
        "doorbell_at": now,  # the caller notifies workers after the commit
        "input_file_id": job.input_file_id,
        "completion_window": job.completion_window,
        "output_expires_after_s": job.output_expires_after_s,
        "validated_at": now if job.input_file_id is None else None,
        "event_number": 0,
        "retry_of": job.retry_of,
        "body_version": job.body_version,
        "compare_plain": job.compare_plain,
        "traceparent": job.traceparent,
        "source_file_id": job.source_file_id,
        "verification_of": job.verification_of,
    }


def request_row(job_id: str, index: int, request: NewRequest, now: float) -> dict[str, Any]:
    """Return the row of a new request: queued, or failed if it was rejected."""
    rejected = request.failure is not None
    return {
        "job_id": job_id,
        "request_index": index,
        "custom_id": request.custom_id,
        "body": None if request.body is None else dict(request.body),
        "status": "failed" if rejected else "queued",
        "attempts": 0,
        "lease_number": 0,
        "finished_at": now if rejected else None,
        "event_number": 0 if rejected else None,
        "expires_at": None if request.timeout_s is None else now + request.timeout_s,
        "identity": request.identity,
        **(error_columns(request.failure) if request.failure is not None else _NO_ERROR),
    }


_NO_ERROR: Final[Mapping[str, None]] = {
    "error_code": None,
    "error_message": None,
    "error_param": None,
    "error_status_code": None,
}


def _counted(chunk: Sequence[tuple[int, NewRequest]], before: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of a job including one more chunk of requests."""
    requests = [request for _, request in chunk]
    return {
        "requests_total": before["requests_total"] + len(requests),
        "requests_failed": before["requests_failed"] + sum(request.failure is not None for request in requests),
        "tokens_asked": before["tokens_asked"] + sum(request.tokens for request in requests),
    }


_NO_REQUESTS: Final[Mapping[str, int]] = {"requests_total": 0, "requests_failed": 0, "tokens_asked": 0}


def _earlier_job(session: Session, job: NewJob) -> InsertedJob:
    """Return the existing job: the one with the same idempotency key, else the one with the same id."""
    same_id = JobRow.id == job.id
    same: ColumnElement[bool] = same_id
    if job.idempotency_key is not None:
        same |= and_(JobRow.api_key_id == (job.api_key_id or ""), JobRow.idempotency_key == job.idempotency_key)
    earlier = session.execute(select(JobRow.id, JobRow.body_sha256).where(same).order_by(same_id).limit(1)).one()
    return InsertedJob(earlier.id, created=False, conflict=earlier.body_sha256 != job.body_sha256)


def _in_chunks(requests: Iterable[NewRequest]) -> Iterator[list[tuple[int, NewRequest]]]:
    """Yield requests with their indexes in chunks of limited rows and bytes."""
    chunk: list[tuple[int, NewRequest]] = []
    size = 0
    for index, request in enumerate(requests):
        chunk.append((index, request))
        size += request.size_bytes
        if len(chunk) >= _MAX_CHUNK_ROWS or size >= _MAX_CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
