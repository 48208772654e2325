"""How requests and jobs end: cancelled, expired, or finalised because nothing of the job is left to do.

writes -> [endings] -> models.  A status that is final never changes again. Whoever locks rows of jobs and of requests
locks those of jobs first, in the order of their ids, so that no two transactions wait for each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from sqlalchemy import ColumnElement, and_, case, select, update
from sqlalchemy.orm import Session

from storage.models import Job, Request
from storage.records import Refusal, RequestKey
from storage.sql import database_now, has_open_requests, is_lapsed, is_request, without_nul

OPEN_JOB_STATUSES: Final = ("in_progress", "cancelling")
_CANCELLABLE: Final = ("validating", "in_progress", "finalizing")
_IS_BATCH: Final = Job.input_file_id.is_not(None)

CANCELLED: Final = Refusal(
    "batch_cancelled", "The job was cancelled before this request was completed.", status_code=409
)
EXPIRED: Final = Refusal(
    "batch_expired", "The completion window was over before this request was completed.", status_code=408
)


def finalise_jobs(session: Session, job_ids: Collection[str]) -> list[tuple[str, str]]:
    """End those of the jobs that have no request left to wait for; return (job_id, final status) of each.

    Of a batch all is decided then, but its files are still to be written: its clerk ends it.
    """
    if not job_ids:
        return []
    now = database_now(session)
    decided = and_(Job.id.in_(job_ids), ~has_open_requests())
    session.execute(
        update(Job)
        .where(decided, _IS_BATCH, Job.status == "in_progress")
        .values(status="finalizing", finalizing_at=now)
    )
    final = case((Job.status == "cancelling", "cancelled"), else_="completed")
    ended = session.execute(
        update(Job)
        .where(decided, ~_IS_BATCH, Job.status.in_(OPEN_JOB_STATUSES))
        .values(status=final, finished_at=now)
        .returning(Job.id, Job.status)
    )
    return sorted((job_id, status) for job_id, status in ended)


def request_cancel(session: Session, job_id: str) -> str | None:
    """Cancel a job as far as nobody is working on it, and return its status; None if there is no such job.

    Requests that are being decoded are cancelled at their worker's next flush, and the job ends with the last of them.
    A batch ends when its clerk has written its files; one that is still being read is read to its end, for each of its
    requests is owed an answer.
    Asking again, or for a job that has ended, changes nothing.
    """
    now = database_now(session)
    session.execute(
        update(Job).where(Job.id == job_id, Job.status.in_(_CANCELLABLE)).values(status="cancelling", cancelling_at=now)
    )
    cancel_unstarted(session, job_id)
    finalise_jobs(session, [job_id])
    return session.scalar(select(Job.status).where(Job.id == job_id))


def expire_jobs(session: Session) -> list[tuple[str, str]]:
    """End what only time can end; return (job_id, final status) of every job that ended.

    Jobs whose completion window is over expire with all that is unfinished. Cancelled jobs end when the workers that
    still had requests of them have let their leases lapse.
    """
    now = database_now(session)
    overdue = lock_jobs(session, and_(Job.status == "in_progress", Job.expires_at <= now))
    expired: list[tuple[str, str]] = []
    if overdue:
        batches = update(Job).where(Job.id.in_(overdue), _IS_BATCH)
        session.execute(batches.values(status="finalizing", finalizing_at=now))
        others = update(Job).where(Job.id.in_(overdue), ~_IS_BATCH).returning(Job.id, Job.status)
        expired = sorted(tuple(row) for row in session.execute(others.values(status="expired", finished_at=now)))
        unfinished = and_(Request.job_id.in_(overdue), Request.status.in_(("queued", "running")))
        _end_requests(session, "expired", EXPIRED, now, unfinished)
    return expired + _end_abandoned(session, now)


def cancel_unstarted(session: Session, job_id: str) -> None:
    """Cancel what nobody is working on of a job that is being cancelled."""
    now = database_now(session)
    _end_requests(session, "cancelled", CANCELLED, now, _left_in_cancelled_jobs(now, [job_id]))


def cancel_requests(session: Session, keys: Collection[RequestKey], now: float) -> None:
    """Cancel requests that the caller has locked."""
    if keys:
        _end_requests(session, "cancelled", CANCELLED, now, is_request(keys))


def lock_jobs(session: Session, condition: ColumnElement[bool]) -> list[str]:
    """Lock the jobs that meet a condition, in the order in which everybody locks them, and return their ids."""
    return list(session.scalars(select(Job.id).where(condition).order_by(Job.id).with_for_update(key_share=True)))


def error_columns(refusal: Refusal) -> dict[str, str | int | None]:
    """Return a refusal as the columns of its request."""
    return {
        "error_code": refusal.code,
        "error_message": without_nul(refusal.message),
        "error_param": refusal.param,
        "error_status_code": refusal.status_code,
    }


def _end_abandoned(session: Session, now: float) -> list[tuple[str, str]]:
    cancelling = lock_jobs(session, Job.status == "cancelling")
    if not cancelling:
        return []
    _end_requests(session, "cancelled", CANCELLED, now, _left_in_cancelled_jobs(now, cancelling))
    return finalise_jobs(session, cancelling)


def _left_in_cancelled_jobs(now: float, job_ids: Iterable[str]) -> ColumnElement[bool]:
    """Return the condition that a request of a cancelled job is in nobody's hands."""
    cancelling = select(Job.id).where(Job.id.in_(list(job_ids)), Job.status == "cancelling")
    return and_(Request.job_id.in_(cancelling), (Request.status == "queued") | is_lapsed(now))


def _end_requests(session: Session, status: str, reason: Refusal, now: float, which: ColumnElement[bool]) -> None:
    """End requests without a result. The lease's number and owner stay: they say who had it last."""
    ended = {"status": status, "finished_at": now, "lease_expires_at": None, **error_columns(reason)}
    session.execute(update(Request).where(which).values(**ended))
