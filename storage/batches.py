"""Batches between their files: who reads the input and writes the output, and what that adds to the record.

A clerk works under a lease with a number that grows with every claim, like a worker: whoever has an older one writes
nothing. Requests are written in pieces, for a large batch must not lock everybody out, and count all at once, when
`start_batch` says that the input is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, delete, func, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import database_now, has_expired_requests, has_open_requests, insert_or_ignore
from storage.keys import enforce_limits
from storage.models import Job, Request
from storage.records import NewRequest
from storage.statuses import BATCH_FILE_JOB_STATUSES, UNREAD_JOB_STATUSES
from storage.transitions import cancel_unclaimed, end_finished_jobs
from storage.writes import request_row

_SAME_NAMES: Final = (
    "endpoint",
    "api_key_id",
    "input_file_id",
    "output_expires_after_s",
    "model",
    "validated_at",
    "traceparent",
)
_CLAIMED: Final = (Job.id, Job.clerk_number, *(getattr(Job, name) for name in _SAME_NAMES))


@dataclass(frozen=True, slots=True)
class BatchClaim:
    """The right to read the input of a batch, or to write its files."""

    job_id: str
    number: int
    endpoint: str
    api_key_id: str
    input_file_id: str
    output_expires_after_s: float | None
    model: str  # '' before the input is read
    validated_at: float | None
    traceparent: str | None

    @property
    def is_validated(self) -> bool:
        """True when its requests stand in the record: the files are to be written."""
        return self.validated_at is not None


@dataclass(frozen=True, slots=True)
class BatchEnd:
    """What a batch leaves behind."""

    output_file_id: str | None
    error_file_id: str | None
    usage: Mapping[str, int]


class ClaimLost(Exception):
    """Another clerk has this batch now."""


def claim_batch(session: Session, lease_s: float) -> BatchClaim | None:
    """Take the oldest batch that needs a clerk and has none; None if there is no such batch.

    Those of owners for whom a clerk is at work already wait behind all others.
    """
    now = database_now(session)
    free = or_(Job.clerk_until.is_(None), Job.clerk_until < now)
    served = select(Job.api_key_id).where(Job.status.in_(BATCH_FILE_JOB_STATUSES), Job.clerk_until >= now)
    waiting = select(Job.id).where(Job.input_file_id.is_not(None), free, _needs_clerk())
    in_turn = waiting.order_by(Job.api_key_id.in_(served), Job.created_at, Job.id)
    job_id = session.scalar(in_turn.limit(1).with_for_update(skip_locked=True))
    if job_id is None:
        return None
    row = session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(clerk_number=Job.clerk_number + 1, clerk_until=now + lease_s)
        .returning(*_CLAIMED)
    ).one()
    return BatchClaim(job_id=row.id, number=row.clerk_number, **{name: getattr(row, name) for name in _SAME_NAMES})


def renew_claim(session: Session, claim: BatchClaim, lease_s: float) -> str:
    """Renew the claim, lock the batch until the transaction ends and return its status; raise ClaimLost."""
    until = database_now(session) + lease_s
    status = session.scalar(
        update(Job)
        .where(Job.id == claim.job_id, Job.clerk_number == claim.number, Job.status.in_(BATCH_FILE_JOB_STATUSES))
        .values(clerk_until=until)
        .returning(Job.status)
    )
    if status is None:
        raise ClaimLost(claim.job_id)
    return str(status)


def release(session: Session, claim: BatchClaim) -> None:
    """Give a batch back unfinished: another clerk may begin at once."""
    mine = update(Job).where(Job.id == claim.job_id, Job.clerk_number == claim.number)
    session.execute(mine.values(clerk_until=None))


def add_requests(session: Session, claim: BatchClaim, first_index: int, requests: Sequence[NewRequest]) -> None:
    """Write a piece of the requests; a clerk that begins again finds those of an earlier one."""
    now = database_now(session)
    rows = [request_row(claim.job_id, first_index + n, request, now) for n, request in enumerate(requests)]
    for row in rows:
        row["event_number"] = None  # nobody is told before all are there
    session.execute(insert_or_ignore(session, Request), rows)


def start_batch(session: Session, claim: BatchClaim, model: str, total: int, tokens: int, lease_s: float) -> str:
    """Let all requests of a batch count from now on, and return its status; one that was cancelled starts nothing.

    Raise QuotaExceeded if they are more than the limits of its key leave room for.
    """
    renew_claim(session, claim, lease_s)
    now = database_now(session)
    refused = and_(Request.job_id == claim.job_id, Request.status == "failed")
    failed = session.scalar(select(func.count()).where(refused))
    session.execute(
        update(Job)
        .where(Job.id == claim.job_id)
        .values(
            model=model,
            requests_total=total,
            requests_failed=failed,
            tokens_asked=tokens,
            event_number=Job.event_number + 1,
            validated_at=now,
            doorbell_at=now,
            clerk_until=None,
            status=case((Job.status == "validating", "in_progress"), else_=Job.status),
        )
    )
    number = select(Job.event_number).where(Job.id == claim.job_id).scalar_subquery()
    session.execute(update(Request).where(refused).values(event_number=number))
    cancel_unclaimed(session, claim.job_id)
    end_finished_jobs(session, [claim.job_id])
    enforce_limits(session, claim.api_key_id)
    return session.scalars(select(Job.status).where(Job.id == claim.job_id)).one()


def fail_batch(
    session: Session, claim: BatchClaim, errors: Sequence[Mapping[str, Any]], model: str, lease_s: float
) -> str:
    """End a batch whose input as a whole is bad, and return its final status: nothing of it runs."""
    status = "cancelled" if renew_claim(session, claim, lease_s) == "cancelling" else "failed"
    session.execute(delete(Request).where(Request.job_id == claim.job_id))  # of a clerk that had found it good
    ended = {"status": status, "finished_at": database_now(session), "clerk_until": None}
    session.execute(update(Job).where(Job.id == claim.job_id).values(errors=list(errors), model=model, **ended))
    return status


def end_batch(session: Session, claim: BatchClaim, end: BatchEnd, lease_s: float) -> str:
    """End a batch whose files are written, and return its final status."""
    status = renew_claim(session, claim, lease_s)
    if status != "cancelling":
        unrun = select(Job.id).where(Job.id == claim.job_id, has_expired_requests())
        status = "completed" if session.scalar(unrun) is None else "expired"
    else:
        status = "cancelled"
    session.execute(
        update(Job)
        .where(Job.id == claim.job_id)
        .values(
            status=status,
            finished_at=database_now(session),
            clerk_until=None,
            output_file_id=end.output_file_id,
            error_file_id=end.error_file_id,
            usage=dict(end.usage),
        )
    )
    return status


def _needs_clerk() -> ColumnElement[bool]:
    unread = and_(Job.status.in_(UNREAD_JOB_STATUSES), Job.validated_at.is_(None))
    decided = and_(Job.status == "cancelling", ~has_open_requests())
    return and_(Job.status.in_(BATCH_FILE_JOB_STATUSES), or_(unread, Job.status == "finalizing", decided))
