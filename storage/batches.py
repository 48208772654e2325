"""Batches: claims of batch-file processors, and the writes that validate and end a batch.

A processor works under a lease with a fencing token (`clerk_number`, which grows with every claim) that ends at
`clerk_until`. Requests are inserted in chunks, so that a large batch does not block other writers, and become claimable
together when `start_batch` marks the input as validated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, delete, func, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import database_now, has_expired_requests, has_open_requests, insert_or_ignore
from storage.keys import enforce_limits
from storage.models import JobRow, Request
from storage.records import NewRequest
from storage.statuses import BATCH_FILE_JOB_STATUSES, UNREAD_JOB_STATUSES
from storage.transitions import cancel_unclaimed, end_finished_jobs
from storage.webhooks import queue_deliveries
from storage.writes import request_row

_COPIED_COLUMNS: Final = (
    "endpoint",
    "api_key_id",
    "input_file_id",
    "output_expires_after_s",
    "model",
    "validated_at",
    "traceparent",
)
_CLAIMED: Final = (JobRow.id, JobRow.clerk_number, *(getattr(JobRow, name) for name in _COPIED_COLUMNS))


@dataclass(frozen=True, slots=True)
class BatchClaim:
    """The lease of a processor to read the input of a batch or to write its files."""

    job_id: str
    number: int
    endpoint: str
    api_key_id: str
    input_file_id: str
    output_expires_after_s: float | None
    model: str  # '' before the input is validated
    validated_at: float | None
    traceparent: str | None

    @property
    def is_validated(self) -> bool:
        """True when all requests are stored, so that only the files are left to write."""
        return self.validated_at is not None


@dataclass(frozen=True, slots=True)
class BatchEnd:
    """What `end_batch` stores: ids of the output and error files (None: no file), and token usage."""

    output_file_id: str | None
    error_file_id: str | None
    usage: Mapping[str, int]


class ClaimLost(Exception):
    """Another processor has claimed this batch."""


def claim_batch(session: Session, lease_s: float) -> BatchClaim | None:
    """Claim the oldest batch that needs a processor and has none; None if there is no such batch.

    Batches of owners that a processor already serves come last.
    """
    now = database_now(session)
    unclaimed = or_(JobRow.clerk_until.is_(None), JobRow.clerk_until < now)
    served = select(JobRow.api_key_id).where(JobRow.status.in_(BATCH_FILE_JOB_STATUSES), JobRow.clerk_until >= now)
    waiting = select(JobRow.id).where(JobRow.input_file_id.is_not(None), unclaimed, _needs_processor())
    ordered = waiting.order_by(JobRow.api_key_id.in_(served), JobRow.created_at, JobRow.id)
    job_id = session.scalar(ordered.limit(1).with_for_update(skip_locked=True))
    if job_id is None:
        return None
    row = session.execute(
        update(JobRow)
        .where(JobRow.id == job_id)
        .values(clerk_number=JobRow.clerk_number + 1, clerk_until=now + lease_s)
        .returning(*_CLAIMED)
    ).one()
    return BatchClaim(job_id=row.id, number=row.clerk_number, **{name: getattr(row, name) for name in _COPIED_COLUMNS})


def renew_claim(session: Session, claim: BatchClaim, lease_s: float) -> str:
    """Renew the claim, lock the batch until the transaction ends and return its status; raise ClaimLost."""
    until = database_now(session) + lease_s
    status = session.scalar(
        update(JobRow)
        .where(
            JobRow.id == claim.job_id, JobRow.clerk_number == claim.number, JobRow.status.in_(BATCH_FILE_JOB_STATUSES)
        )
        .values(clerk_until=until)
        .returning(JobRow.status)
    )
    if status is None:
        raise ClaimLost(claim.job_id)
    return str(status)


def release(session: Session, claim: BatchClaim) -> None:
    """Release an unfinished batch: another processor may claim it at once."""
    mine = update(JobRow).where(JobRow.id == claim.job_id, JobRow.clerk_number == claim.number)
    session.execute(mine.values(clerk_until=None))


def add_requests(session: Session, claim: BatchClaim, first_index: int, requests: Sequence[NewRequest]) -> None:
    """Insert a chunk of requests; rows of an earlier processor are skipped."""
    now = database_now(session)
    rows = [request_row(claim.job_id, first_index + n, request, now) for n, request in enumerate(requests)]
    for row in rows:
        row["event_number"] = None  # readers of the event log see no request before all are stored
    session.execute(insert_or_ignore(session, Request), rows)


def start_batch(session: Session, claim: BatchClaim, model: str, total: int, tokens: int, lease_s: float) -> str:
    """Make all requests of a batch claimable and return the batch's status; a cancelled batch starts none.

    Raise QuotaExceeded if the requests exceed the limits of the batch's API key.
    """
    renew_claim(session, claim, lease_s)
    now = database_now(session)
    rejected = and_(Request.job_id == claim.job_id, Request.status == "failed")
    failed = session.scalar(select(func.count()).where(rejected))
    session.execute(
        update(JobRow)
        .where(JobRow.id == claim.job_id)
        .values(
            model=model,
            requests_total=total,
            requests_failed=failed,
            tokens_asked=tokens,
            event_number=JobRow.event_number + 1,
            validated_at=now,
            doorbell_at=now,
            clerk_until=None,
            status=case((JobRow.status == "validating", "in_progress"), else_=JobRow.status),
        )
    )
    number = select(JobRow.event_number).where(JobRow.id == claim.job_id).scalar_subquery()
    session.execute(update(Request).where(rejected).values(event_number=number))
    cancel_unclaimed(session, claim.job_id)
    end_finished_jobs(session, [claim.job_id])
    enforce_limits(session, claim.api_key_id)
    return session.scalars(select(JobRow.status).where(JobRow.id == claim.job_id)).one()


def fail_batch(
    session: Session, claim: BatchClaim, errors: Sequence[Mapping[str, Any]], model: str, lease_s: float
) -> str:
    """End a batch with an invalid input file and return its final status. None of its requests runs."""
    status = "cancelled" if renew_claim(session, claim, lease_s) == "cancelling" else "failed"
    session.execute(
        delete(Request).where(Request.job_id == claim.job_id)
    )  # inserted by an earlier processor that found the input valid
    ended = {"status": status, "finished_at": database_now(session), "clerk_until": None}
    session.execute(update(JobRow).where(JobRow.id == claim.job_id).values(errors=list(errors), model=model, **ended))
    queue_deliveries(session, [claim.job_id])
    return status


def end_batch(session: Session, claim: BatchClaim, end: BatchEnd, lease_s: float) -> str:
    """End a batch whose files are written and return its final status."""
    status = renew_claim(session, claim, lease_s)
    if status != "cancelling":
        unrun = select(JobRow.id).where(JobRow.id == claim.job_id, has_expired_requests())
        status = "completed" if session.scalar(unrun) is None else "expired"
    else:
        status = "cancelled"
    session.execute(
        update(JobRow)
        .where(JobRow.id == claim.job_id)
        .values(
            status=status,
            finished_at=database_now(session),
            clerk_until=None,
            output_file_id=end.output_file_id,
            error_file_id=end.error_file_id,
            usage=dict(end.usage),
        )
    )
    queue_deliveries(session, [claim.job_id])
    return status


@cache
def _needs_processor() -> ColumnElement[bool]:
    unread = and_(JobRow.status.in_(UNREAD_JOB_STATUSES), JobRow.validated_at.is_(None))
    decided = and_(JobRow.status == "cancelling", ~has_open_requests())
    return and_(JobRow.status.in_(BATCH_FILE_JOB_STATUSES), or_(unread, JobRow.status == "finalizing", decided))
