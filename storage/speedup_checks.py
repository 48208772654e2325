"""Comparisons: a finished job that asked for it has some of its requests decoded both ways, by a worker that is idle.

Which requests is drawn from the job's id, so that everybody draws the same. One worker at a time has a comparison in
hand; whoever is done first writes it, and it is written as a whole. A worker that compares does nothing else, so a
comparison is always alone in trial: having cost as many workers as a request may (storage.lease_recovery), it is given
up. Only deaths that were seen count. One that lapsed is taken up by the next worker; that attempt replaces the last.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from typing import Final

from sqlalchemy import ColumnElement, and_, case, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import database_now, insert_many, is_one_of
from storage.lease_recovery import MAX_LONE_CRASHES, POISON
from storage.models import Job, Output, Request, SpeedupCheck
from storage.records import SampledRequest, SpeedupCheckClaim, SpeedupCheckResult
from storage.transitions import lock_jobs

_POISON: Final = replace(POISON, message="The worker process died twice while it decoded these requests both ways.")


def is_due(session: Session, model: str, body_version: int) -> bool:
    """Return whether some job of the model waits for its comparison, and no worker has it in hand."""
    return session.scalar(select(_is_due(database_now(session), model, body_version))) or False


def claim_check(
    session: Session, model: str, body_version: int, lease_s: float, worker_id: str | None = None
) -> SpeedupCheckClaim | None:
    """Take the comparison of the job that waits longest in hand, for so long; None if none waits."""
    now = database_now(session)
    oldest = (
        select(Job.id)
        .where(_waits(now, model, body_version))
        .order_by(Job.finished_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    job_id = session.scalar(oldest)
    if job_id is None:
        return None
    counted = case((Job.comparing_until.is_(None), 1), else_=0)
    in_hand = {
        "comparing_until": now + lease_s,
        "comparing_by": worker_id,
        "compare_attempts": Job.compare_attempts + counted,
    }
    taken = update(Job).where(Job.id == job_id).values(in_hand)
    endpoint = session.execute(taken.returning(Job.endpoint)).scalar_one()
    return SpeedupCheckClaim(job_id, endpoint, tuple(_finished_texts(session, job_id)))


def renew_check(session: Session, job_id: str, lease_s: float) -> None:
    """Go on having a comparison in hand."""
    session.execute(update(Job).where(Job.id == job_id).values(comparing_until=database_now(session) + lease_s))


def release_check(session: Session, job_id: str) -> None:
    """Leave a comparison to whoever is idle next; it begins anew, and this attempt does not count."""
    handed_back = {"comparing_until": None, "comparing_by": None, "compare_attempts": Job.compare_attempts - 1}
    session.execute(update(Job).where(Job.id == job_id).values(handed_back))


def save_check(session: Session, worker_id: str, job_id: str, rows: Iterable[SpeedupCheckResult]) -> None:
    """Write a comparison that is done, unless somebody else has."""
    now = database_now(session)
    first = update(Job).where(Job.id == job_id, Job.compared_at.is_(None)).values(compared_at=now, comparing_until=None)
    if session.execute(first.returning(Job.id)).first() is None:
        return
    written = [{"job_id": job_id, "worker_id": worker_id, **asdict(row)} for row in rows]
    if written:
        insert_many(session, SpeedupCheck, written)


def fail_checks(session: Session, dead: Collection[str] = ()) -> list[str]:
    """End the comparisons that have cost too many workers, with an error for each request; return their jobs.

    `dead` are workers whose process is known to have ended.
    """
    if not dead:
        return []
    job_ids = lock_jobs(session, and_(_is_wanted(), Job.comparing_by.in_(dead)))
    if not job_ids:
        return []
    freed = update(Job).where(Job.id.in_(job_ids)).values(comparing_until=None, comparing_by=None)
    attempts = session.execute(freed.returning(Job.id, Job.compare_attempts)).all()
    job_ids = sorted(job_id for job_id, count in attempts if count >= MAX_LONE_CRASHES)
    for job_id in job_ids:
        indexes = [text.request_index for text in _finished_texts(session, job_id)]
        errors = [SpeedupCheckResult(i, error_code=_POISON.code, error_message=_POISON.message) for i in indexes]
        save_check(session, "", job_id, errors)
    return job_ids


def _is_due(now: float, model: str, body_version: int) -> ColumnElement[bool]:
    return select(Job.id).where(_waits(now, model, body_version)).exists()


def _waits(now: float, model: str, body_version: int) -> ColumnElement[bool]:
    in_no_hand = or_(Job.comparing_until.is_(None), Job.comparing_until < now)
    may_be_tried = or_(Job.compare_attempts < MAX_LONE_CRASHES, Job.comparing_until.is_not(None))
    # Only of a job that has its answers: whoever cancels one wants no more of it.
    finished = and_(Job.status == "completed", Job.model == model, Job.body_version <= body_version)
    return and_(_is_wanted(), finished, in_no_hand, may_be_tried)


def _is_wanted() -> ColumnElement[bool]:
    return and_(Job.compare_plain > 0, Job.compared_at.is_(None))


def _finished_texts(session: Session, job_id: str) -> Iterable[SampledRequest]:
    """Yield those of the job's sample that have an answer."""
    total, asked = session.execute(select(Job.requests_total, Job.compare_plain).where(Job.id == job_id)).one()
    sample = sorted(random.Random(job_id).sample(range(total), min(asked, total)))
    rows = session.execute(
        select(Request.request_index, Request.body, Output.token_ids)
        .join(Output, and_(Output.job_id == Request.job_id, Output.request_index == Request.request_index))
        .where(
            is_one_of((Request.job_id, Request.request_index), [(job_id, index) for index in sample]),
            Output.choice_index == 0,
        )
        .order_by(Request.request_index)
    )
    for row in rows:
        yield SampledRequest(row.request_index, row.body, tuple(row.token_ids))
