"""State transitions: end requests and jobs by cancellation, by expiry, or because no request of the job is open.

A final status never changes. Lock order: rows of jobs before rows of requests, each by id, so that transactions can't
deadlock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

from sqlalchemy import ColumnElement, ScalarSelect, Select, Update, and_, bindparam, case, func, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from storage.dialect import (
    database_now,
    has_expired_requests,
    has_open_requests,
    is_lapsed,
    is_one_of,
    is_request,
    storable,
)
from storage.models import JobRow, Partial, Request
from storage.pilots import pause_after_pilot
from storage.records import FailedRequest, RequestFailure, RequestKey
from storage.statuses import ACTIVE_JOB_STATUSES, CANCELLABLE_JOB_STATUSES, OPEN_REQUEST_STATUSES
from storage.webhooks import queue_deliveries

_IS_BATCH: Final = JobRow.input_file_id.is_not(None)

_ROWS_AT_ONCE: Final = 500  # requests ended in one transaction

CANCELLED: Final = RequestFailure(
    "batch_cancelled", "The job was cancelled before this request was completed.", status_code=409
)
EXPIRED: Final = RequestFailure(
    "batch_expired", "The completion window ended before this request was completed.", status_code=408
)

DEADLINE_EXCEEDED: Final = RequestFailure(
    "deadline_exceeded", "The request was not completed within its timeout.", status_code=408
)


@dataclass(frozen=True, slots=True)
class Ended:
    """Jobs and requests that one transaction ended."""

    jobs: tuple[tuple[str, str], ...] = ()  # (job_id, final status)
    failed: tuple[FailedRequest, ...] = ()
    more: bool = False  # more rows are due: call again


def end_finished_jobs(session: Session, job_ids: Collection[str]) -> list[tuple[str, str]]:
    """End those of the jobs that have no open request; return (job_id, final status) of each.

    A batch moves to `finalizing` instead: the batch-file processor writes its files and ends it.
    """
    if not job_ids:
        return []
    finalizing, ending = _endings()
    given = {"job_ids": list(job_ids), "now": database_now(session)}
    pause_after_pilot(session, job_ids)
    session.connection().execute(finalizing, given)
    pairs = sorted((job_id, status) for job_id, status in session.connection().execute(ending, given))
    queue_deliveries(session, [job_id for job_id, _ in pairs])
    return pairs


@cache  # each flush that ends a request executes them, and building a statement takes longer than executing it
def _endings() -> tuple[Update, ReturningUpdate[str, str]]:
    """Return what moves batches without open requests to `finalizing`, and what ends other such jobs."""
    finished = and_(JobRow.id.in_(bindparam("job_ids", expanding=True)), ~has_open_requests())
    finalizing = (
        update(JobRow)
        .where(finished, _IS_BATCH, JobRow.status == "in_progress")
        .values(status="finalizing", finalizing_at=bindparam("now"))
    )
    final = case((JobRow.status == "cancelling", "cancelled"), (has_expired_requests(), "expired"), else_="completed")
    ending = (
        update(JobRow)
        .where(finished, ~_IS_BATCH, JobRow.status.in_(ACTIVE_JOB_STATUSES))
        .values(status=final, finished_at=bindparam("now"))
        .returning(JobRow.id, JobRow.status)
    )
    return finalizing, ending


def request_cancel(session: Session, job_id: str) -> str | None:
    """Cancel a job and return its status; None if the job does not exist. Idempotent; ended jobs stay as they are.

    Up to `_ROWS_AT_ONCE` unclaimed requests are cancelled here, so that the caller does not wait; `end_jobs` cancels
    the rest. Running requests are cancelled by their worker's next flush, and the job ends with the last of them. A
    batch ends when its files are written; one that is validating is read to its end first, because each line gets a row
    in the error file.
    """
    now = database_now(session)
    session.execute(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.status.in_(CANCELLABLE_JOB_STATUSES))
        .values(status="cancelling", cancelling_at=now)
    )
    cancel_unclaimed(session, job_id)
    end_finished_jobs(session, [job_id])
    return session.scalar(select(JobRow.status).where(JobRow.id == job_id))


def end_jobs(session: Session) -> Ended:
    """Expire overdue jobs and finish cancelled ones, up to `_ROWS_AT_ONCE` requests: other writers wait no longer.

    Jobs whose completion window is over expire with all their open requests. Cancelled jobs end when none of their
    requests is queued and the leases of running ones have lapsed.
    """
    now = database_now(session)
    overdue, cancelling = _lock_ending(session, now)
    is_open = and_(Request.job_id.in_(overdue), Request.status.in_(OPEN_REQUEST_STATUSES))
    count = _end_some(session, "expired", EXPIRED, now, is_open) if overdue else 0
    count += cancel_unclaimed(session, *cancelling) if cancelling else 0
    return Ended(tuple(end_finished_jobs(session, [*overdue, *cancelling])), more=count >= _ROWS_AT_ONCE)


def _lock_ending(session: Session, now: float) -> tuple[list[str], list[str]]:
    """Lock overdue and cancelling jobs in one statement, to keep the lock order; return the ids of each."""
    is_overdue = and_(JobRow.status == "in_progress", JobRow.expires_at <= now)
    locked = lock_jobs(session, or_(is_overdue, JobRow.status == "cancelling"))
    overdue = set(session.scalars(select(JobRow.id).where(JobRow.id.in_(locked), is_overdue))) if locked else set()
    return [job_id for job_id in locked if job_id in overdue], [job_id for job_id in locked if job_id not in overdue]


def cancel_unclaimed(session: Session, *job_ids: str) -> int:
    """Cancel up to `_ROWS_AT_ONCE` queued or lapsed requests of cancelling jobs; return how many."""
    now = database_now(session)
    return _end_some(session, "cancelled", CANCELLED, now, _is_unclaimed(now, job_ids))


def expire_requests(session: Session) -> Ended:
    """Fail up to `_ROWS_AT_ONCE` requests whose own deadline is over, and end jobs without other open requests.

    A worker that decodes one of them finds its lease lost.
    """
    now = database_now(session)
    overdue = and_(Request.expires_at <= now, Request.finished_at.is_(None))
    job_ids = lock_jobs(
        session, JobRow.id.in_(select(Request.job_id).where(overdue)) & (JobRow.status == "in_progress")
    )
    if not job_ids:
        return Ended()
    found = session.execute(
        select(Request.job_id, Request.request_index)
        .where(overdue, Request.job_id.in_(job_ids))
        .order_by(Request.job_id, Request.request_index)
        .limit(_ROWS_AT_ONCE)
        .with_for_update(key_share=True)
    )
    keys = [(job_id, index) for job_id, index in found]
    failed = fail_requests(session, keys, DEADLINE_EXCEEDED, now)
    ended = end_finished_jobs(session, {request.job_id for request in failed})
    return Ended(tuple(ended), tuple(failed), more=len(keys) >= _ROWS_AT_ONCE)


def fail_requests(
    session: Session, keys: Collection[RequestKey], reason: RequestFailure, now: float
) -> list[FailedRequest]:
    """Fail requests that the caller has locked with their jobs, update the counts, and return them for their events."""
    if not keys:
        return []
    number = next_event_number(session, {job_id for job_id, _ in keys}, is_request(keys))
    ended = {"status": "failed", "finished_at": now, "lease_expires_at": None, "suspect_group": None}
    rows = session.execute(
        update(Request)
        .where(is_request(keys))
        .values(**ended, event_number=number, **error_columns(reason))
        .returning(Request.job_id, Request.request_index, Request.custom_id, Request.attempts)
    ).all()
    for job_id, count in Counter(row.job_id for row in rows).items():
        session.execute(
            update(JobRow).where(JobRow.id == job_id).values(requests_failed=JobRow.requests_failed + count)
        )
    last = _last_seqs(session, keys)
    # A request that was never claimed has no events yet; for others, seq 0 is `started`.
    return [
        FailedRequest(*key, row.custom_id, last.get(key, 0) + 1 if row.attempts else 0, reason)
        for row in sorted(rows)
        for key in [(row.job_id, row.request_index)]
    ]


def cancel_requests(session: Session, keys: Collection[RequestKey], now: float) -> None:
    """Cancel requests that the caller has locked."""
    if keys:
        _end_requests(session, "cancelled", CANCELLED, now, {job_id for job_id, _ in keys}, is_request(keys))


def return_requests(session: Session, which: ColumnElement[bool]) -> set[RequestKey]:
    """Return running requests to the queue and return their keys. The attempt does not count; checkpoints stay."""
    returned = session.execute(
        update(Request)
        .where(which, Request.status == "running")
        .values(status="queued", attempts=Request.attempts - 1, lease_owner=None, lease_expires_at=None)
        .returning(Request.job_id, Request.request_index)
    )
    return {(job_id, index) for job_id, index in returned}


def lock_jobs(session: Session, condition: ColumnElement[bool]) -> list[str]:
    """Lock the jobs that meet a condition, in lock order, and return their ids."""
    return list(session.scalars(locked_jobs(condition)))


def locked_jobs(condition: ColumnElement[bool]) -> Select[str]:
    """Return the statement of `lock_jobs`, for one that is built once."""
    return select(JobRow.id).where(condition).order_by(JobRow.id).with_for_update(key_share=True)


def error_columns(failure: RequestFailure) -> dict[str, str | int | None]:
    """Return a failure as columns of `requests`."""
    return {
        "error_code": failure.code,
        "error_message": storable(failure.message),
        "error_param": None if failure.param is None else storable(failure.param),
        "error_status_code": failure.status_code,
    }


def _last_seqs(session: Session, keys: Collection[RequestKey]) -> dict[RequestKey, int]:
    """Return the last committed event seq of choice 0 of each request that has one."""
    rows = session.execute(
        select(Partial.job_id, Partial.request_index, func.max(Partial.seq))
        .where(is_one_of((Partial.job_id, Partial.request_index), keys), Partial.choice_index == 0)
        .group_by(Partial.job_id, Partial.request_index)
    )
    return {(job_id, index): seq for job_id, index, seq in rows}


def _is_unclaimed(now: float, job_ids: Iterable[str]) -> ColumnElement[bool]:
    """Return the condition that a request of a cancelling job is queued or its lease has lapsed."""
    cancelling = select(JobRow.id).where(JobRow.id.in_(list(job_ids)), JobRow.status == "cancelling")
    return and_(Request.job_id.in_(cancelling), (Request.status == "queued") | is_lapsed(now))


def next_event_number(session: Session, job_ids: Collection[str], which: ColumnElement[bool]) -> ScalarSelect[int]:
    """Take the next event number of each job with requests to end, and return it as a scalar of `requests`.

    Write it as `event_number` in the statement that ends the requests: event-log readers rely on the order
    (storage.event_log).
    """
    ending = select(Request.job_id).where(Request.job_id == JobRow.id, which).exists()
    session.execute(update(JobRow).where(JobRow.id.in_(job_ids), ending).values(event_number=JobRow.event_number + 1))
    return select(JobRow.event_number).where(JobRow.id == Request.job_id).scalar_subquery()


def _end_some(session: Session, status: str, reason: RequestFailure, now: float, which: ColumnElement[bool]) -> int:
    """End up to `_ROWS_AT_ONCE` requests whose jobs the caller has locked; return how many."""
    found = session.execute(select(Request.job_id, Request.request_index).where(which).limit(_ROWS_AT_ONCE))
    keys = [(job_id, index) for job_id, index in found]
    if keys:
        _end_requests(session, status, reason, now, {job_id for job_id, _ in keys}, is_request(keys))
    return len(keys)


def _end_requests(
    session: Session,
    status: str,
    reason: RequestFailure,
    now: float,
    job_ids: Collection[str],
    which: ColumnElement[bool],
) -> None:
    """End requests of these jobs with an error. `lease_number` and `lease_owner` stay: they name the last owner."""
    number = next_event_number(session, job_ids, which)
    ended = {"status": status, "finished_at": now, "lease_expires_at": None, "event_number": number}
    session.execute(update(Request).where(which).values(**ended, **error_columns(reason)))
