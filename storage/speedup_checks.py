"""Speed-up checks: an idle worker decodes a sample of a completed job's requests again, with and without drafts.

The sample (`compare_plain` requests) is drawn with the job id as seed, so every worker draws the same one. One worker
at a time has a job's check, under a lease; the results are written together, once. A worker runs nothing else beside
a check. So after MAX_LONE_CRASHES observed crashes the check is failed, as a poison request would be
(storage.lease_recovery). A lapsed check is claimed by the next idle worker and starts over.

Columns: `comparing_until` and `comparing_by` are the lease, `compared_at` the end, table `comparisons` the results.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from functools import cache
from typing import Final

from sqlalchemy import ColumnElement, Select, and_, bindparam, case, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import database_now, insert_many, is_one_of
from storage.lease_recovery import MAX_LONE_CRASHES, POISON
from storage.models import CheckedRequest, ChoiceOutput, JobRow, Request
from storage.records import RequestPlan, SampledRequest, SpeedupCheckClaim, SpeedupCheckResult
from storage.transitions import lock_jobs

_POISON: Final = replace(
    POISON, message="The worker process crashed twice while it decoded these requests with and without drafts."
)


def is_due(session: Session, model: str, body_version: int) -> bool:
    """Return whether a job of the model waits for its check and no worker holds it."""
    given = {"now": database_now(session), "model": model, "body_version": body_version}
    return session.connection().execute(_due(), given).scalar() or False


def claim_check(
    session: Session, model: str, body_version: int, lease_s: float, worker_id: str | None = None
) -> SpeedupCheckClaim | None:
    """Claim the check of the job that has waited longest, for `lease_s`; None if none waits."""
    now = database_now(session)
    oldest = (
        select(JobRow.id)
        .where(_waits())
        .order_by(JobRow.finished_at, JobRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    job_id = session.scalar(oldest, {"now": now, "model": model, "body_version": body_version})
    if job_id is None:
        return None
    new_attempt = case((JobRow.comparing_until.is_(None), 1), else_=0)  # one that lapsed has been counted
    lease = {
        "comparing_until": now + lease_s,
        "comparing_by": worker_id,
        "compare_attempts": JobRow.compare_attempts + new_attempt,
    }
    taken = update(JobRow).where(JobRow.id == job_id).values(lease)
    endpoint = session.execute(taken.returning(JobRow.endpoint)).scalar_one()
    return SpeedupCheckClaim(job_id, endpoint, tuple(_sampled_requests(session, job_id)))


def renew_check(session: Session, job_id: str, lease_s: float) -> None:
    """Extend the lease of a check to `lease_s` from now."""
    session.execute(update(JobRow).where(JobRow.id == job_id).values(comparing_until=database_now(session) + lease_s))


def release_check(session: Session, job_id: str) -> None:
    """Release a check to the next idle worker. It starts over, and this attempt does not count."""
    released = {"comparing_until": None, "comparing_by": None, "compare_attempts": JobRow.compare_attempts - 1}
    session.execute(update(JobRow).where(JobRow.id == job_id).values(released))


def save_check(session: Session, worker_id: str, job_id: str, rows: Iterable[SpeedupCheckResult]) -> None:
    """Write the results of a check, unless another worker has."""
    now = database_now(session)
    first = (
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.compared_at.is_(None))
        .values(compared_at=now, comparing_until=None)
    )
    if session.execute(first.returning(JobRow.id)).first() is None:
        return
    written = [{"job_id": job_id, "worker_id": worker_id, **asdict(row)} for row in rows]
    if written:
        insert_many(session, CheckedRequest, written)


def fail_checks(session: Session, dead: Collection[str] = ()) -> list[str]:
    """End the checks that have crashed too many workers, with an error for each request; return their jobs.

    `dead` are workers whose process is known to have ended.
    """
    if not dead:
        return []
    job_ids = lock_jobs(session, and_(_is_requested(), JobRow.comparing_by.in_(dead)))
    if not job_ids:
        return []
    released = update(JobRow).where(JobRow.id.in_(job_ids)).values(comparing_until=None, comparing_by=None)
    attempts = session.execute(released.returning(JobRow.id, JobRow.compare_attempts)).all()
    job_ids = sorted(job_id for job_id, count in attempts if count >= MAX_LONE_CRASHES)
    for job_id in job_ids:
        indexes = [request.request_index for request in _sampled_requests(session, job_id)]
        errors = [SpeedupCheckResult(i, error_code=_POISON.code, error_message=_POISON.message) for i in indexes]
        save_check(session, "", job_id, errors)
    return job_ids


@cache  # an idle worker asks every second, and building a statement takes longer than executing it
def _due() -> Select[bool]:
    return select(select(JobRow.id).where(_waits()).exists())


def _waits() -> ColumnElement[bool]:
    """Return the condition that a job waits for its check; parameters: `now`, `model`, `body_version`."""
    not_held = or_(JobRow.comparing_until.is_(None), JobRow.comparing_until < bindparam("now"))
    may_be_tried = or_(JobRow.compare_attempts < MAX_LONE_CRASHES, JobRow.comparing_until.is_not(None))
    # Only completed jobs: a cancelled or expired job gets no more work.
    finished = and_(
        JobRow.status == "completed",
        JobRow.model == bindparam("model"),
        JobRow.body_version <= bindparam("body_version"),
    )
    return and_(_is_requested(), finished, not_held, may_be_tried)


def _is_requested() -> ColumnElement[bool]:
    return and_(JobRow.compare_plain > 0, JobRow.compared_at.is_(None))


def _sampled_requests(session: Session, job_id: str) -> Iterable[SampledRequest]:
    """Yield the requests of the job's sample that have an output with tokens."""
    total, asked = session.execute(select(JobRow.requests_total, JobRow.compare_plain).where(JobRow.id == job_id)).one()
    sample = sorted(random.Random(job_id).sample(range(total), min(asked, total)))
    rows = session.execute(
        select(
            Request.request_index,
            Request.body,
            Request.answer_format,
            Request.sampling_defaults,
            ChoiceOutput.token_ids,
        )
        .join(
            ChoiceOutput,
            and_(ChoiceOutput.job_id == Request.job_id, ChoiceOutput.request_index == Request.request_index),
        )
        .where(
            is_one_of((Request.job_id, Request.request_index), [(job_id, index) for index in sample]),
            ChoiceOutput.choice_index == 0,
            ChoiceOutput.completion_tokens > 0,
            Request.body.is_not(None),  # NULL: deleted because of its age
        )
        .order_by(Request.request_index)
    )
    for row in rows:
        plan = RequestPlan(row.answer_format, row.sampling_defaults)
        yield SampledRequest(row.request_index, row.body, tuple(row.token_ids), plan)
