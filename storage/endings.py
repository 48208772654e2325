"""How requests and jobs end: cancelled, expired, or finalised because nothing of the job is left to do.

writes -> [endings] -> models.  A status that is final never changes again. Whoever locks rows of jobs and of requests
locks those of jobs first, in the order of their ids, so that no two transactions wait for each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Final

from sqlalchemy import ColumnElement, and_, case, func, or_, select, update
from sqlalchemy.orm import Session

from storage.models import Job, Partial, Request
from storage.records import FailedRequest, Refusal, RequestKey
from storage.sql import database_now, has_open_requests, is_lapsed, is_one_of, is_request, without_nul

OPEN_JOB_STATUSES: Final = ("in_progress", "cancelling")

CANCELLED: Final = Refusal(
    "batch_cancelled", "The job was cancelled before this request was completed.", status_code=409
)
EXPIRED: Final = Refusal(
    "batch_expired", "The completion window was over before this request was completed.", status_code=408
)

LATE: Final = Refusal("deadline_exceeded", "The request was not completed within its timeout.", status_code=408)


def finalise_jobs(session: Session, job_ids: Collection[str]) -> list[tuple[str, str]]:
    """End those of the jobs that have no request left to wait for; return (job_id, final status) of each."""
    if not job_ids:
        return []
    final = case((Job.status == "cancelling", "cancelled"), else_="completed")
    ended = session.execute(
        update(Job)
        .where(Job.id.in_(job_ids), Job.status.in_(OPEN_JOB_STATUSES), ~has_open_requests())
        .values(status=final, finished_at=database_now(session))
        .returning(Job.id, Job.status)
    )
    return sorted((job_id, status) for job_id, status in ended)


def request_cancel(session: Session, job_id: str) -> str | None:
    """Cancel a job as far as nobody is working on it, and return its status; None if there is no such job.

    Requests that are being decoded are cancelled at their worker's next flush, and the job ends with the last of them.
    Asking again, or for a job that has ended, changes nothing.
    """
    now = database_now(session)
    session.execute(
        update(Job).where(Job.id == job_id, Job.status == "in_progress").values(status="cancelling", cancelling_at=now)
    )
    _end_requests(session, "cancelled", CANCELLED, now, _left_in_cancelled_jobs(now, [job_id]))
    finalise_jobs(session, [job_id])
    return session.scalar(select(Job.status).where(Job.id == job_id))


def expire_jobs(session: Session) -> list[tuple[str, str]]:
    """End what only time can end; return (job_id, final status) of every job that ended.

    Jobs whose completion window is over expire with all that is unfinished. Cancelled jobs end when the workers that
    still had requests of them have let their leases lapse.
    """
    now = database_now(session)
    overdue, cancelling = _lock_ending(session, now)
    if overdue:
        session.execute(update(Job).where(Job.id.in_(overdue)).values(status="expired", finished_at=now))
        unfinished = and_(Request.job_id.in_(overdue), Request.status.in_(("queued", "running")))
        _end_requests(session, "expired", EXPIRED, now, unfinished)
    return [(job_id, "expired") for job_id in overdue] + _end_abandoned(session, now, cancelling)


def _lock_ending(session: Session, now: float) -> tuple[list[str], list[str]]:
    """Lock the jobs that are overdue and those that are being cancelled, in one go: locks are taken in one order."""
    is_overdue = and_(Job.status == "in_progress", Job.expires_at <= now)
    locked = lock_jobs(session, or_(is_overdue, Job.status == "cancelling"))
    overdue = set(session.scalars(select(Job.id).where(Job.id.in_(locked), is_overdue))) if locked else set()
    return [job_id for job_id in locked if job_id in overdue], [job_id for job_id in locked if job_id not in overdue]


def expire_requests(session: Session) -> tuple[list[FailedRequest], list[tuple[str, str]]]:
    """Fail the requests whose own deadline is over; return them, and (job_id, final status) of jobs that ended so.

    Whoever decodes one of them finds its lease lost.
    """
    now = database_now(session)
    late = and_(Request.expires_at <= now, Request.finished_at.is_(None))
    job_ids = lock_jobs(session, Job.id.in_(select(Request.job_id).where(late)) & (Job.status == "in_progress"))
    if not job_ids:
        return [], []
    keys = session.execute(
        select(Request.job_id, Request.request_index)
        .where(late, Request.job_id.in_(job_ids))
        .order_by(Request.job_id, Request.request_index)
        .with_for_update(key_share=True)
    )
    failed = fail_requests(session, [(job_id, index) for job_id, index in keys], LATE, now)
    return failed, finalise_jobs(session, {request.job_id for request in failed})


def fail_requests(session: Session, keys: Collection[RequestKey], reason: Refusal, now: float) -> list[FailedRequest]:
    """Fail requests that the caller has locked with their jobs, count them, and return what their events must say."""
    if not keys:
        return []
    ended = {"status": "failed", "finished_at": now, "lease_expires_at": None, "suspect_group": None}
    rows = session.execute(
        update(Request)
        .where(is_request(keys))
        .values(**ended, **error_columns(reason))
        .returning(Request.job_id, Request.request_index, Request.custom_id, Request.attempts)
    ).all()
    for job_id, count in Counter(row.job_id for row in rows).items():
        session.execute(update(Job).where(Job.id == job_id).values(requests_failed=Job.requests_failed + count))
    last = _last_seqs(session, keys)
    # One that was never claimed has no events; `started` is number 0 of all others.
    return [
        FailedRequest(*key, row.custom_id, last.get(key, 0) + 1 if row.attempts else 0, reason)
        for row in sorted(rows)
        for key in [(row.job_id, row.request_index)]
    ]


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


def _last_seqs(session: Session, keys: Collection[RequestKey]) -> dict[RequestKey, int]:
    """Return the number of the last event of choice 0 that was committed, where there is one."""
    rows = session.execute(
        select(Partial.job_id, Partial.request_index, func.max(Partial.seq))
        .where(is_one_of((Partial.job_id, Partial.request_index), keys), Partial.choice_index == 0)
        .group_by(Partial.job_id, Partial.request_index)
    )
    return {(job_id, index): seq for job_id, index, seq in rows}


def _end_abandoned(session: Session, now: float, cancelling: Collection[str]) -> list[tuple[str, str]]:
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
