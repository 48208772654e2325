"""Health derived from the database: live workers, jobs without a worker, stalled jobs. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import Session

from storage import queries
from storage.dialect import database_now, has_queued_requests, is_serving
from storage.models import JobRow, Partial, Request, Worker

_HOUR_S = 3600.0
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Health:
    """Health of workers, jobs and requests."""

    alive: Mapping[str, int]  # live workers by model
    lost_lately: int  # workers, within the last hour
    open_jobs: int
    open_requests: int
    unserved: Mapping[str, int]  # open jobs by model, of models without a live worker
    stuck: tuple[str, ...]  # ids of stalled jobs of served models
    lapsed: int  # running requests with a lapsed lease, not requeued yet
    poisoned: int  # requests, within the last day


def health(session: Session, stuck_s: float) -> Health:
    """Return the current health. A job without progress for `stuck_s` is stuck."""
    now = database_now(session)
    served = {model.target for model in queries.models(session)}
    alive = Counter(
        session.scalars(select(Worker.target).where(Worker.stopped_at.is_(None), Worker.lost_at.is_(None))).all()
    )
    lost = session.scalar(select(func.count()).select_from(Worker).where(Worker.lost_at > now - _HOUR_S))
    open_jobs = session.execute(select(JobRow.id, JobRow.model).where(JobRow.status == "in_progress")).all()
    lapsed = session.scalar(
        select(func.count())
        .select_from(Request)
        .join(JobRow, JobRow.id == Request.job_id)
        .where(JobRow.status == "in_progress", Request.status == "running", Request.lease_expires_at < now)
    )
    return Health(
        alive={model: count for model, count in alive.items() if model in served},
        lost_lately=lost or 0,
        open_jobs=len(open_jobs),
        open_requests=queries.open_requests(session),
        unserved=Counter(job.model for job in open_jobs if job.model not in served),
        stuck=_stuck(session, served, now - stuck_s),
        lapsed=lapsed or 0,
        poisoned=_poisoned(session, now - _DAY_S),
    )


def _stuck(session: Session, served: set[str], since: float) -> tuple[str, ...]:
    """Return up to 20 jobs older than `since` that have open requests and no commit since then."""
    running = select(Request.job_id).where(Request.job_id == JobRow.id, Request.status == "running").correlate(JobRow)
    moved = select(Partial.job_id).where(Partial.job_id == JobRow.id, Partial.committed_at > since).correlate(JobRow)
    ended = select(Request.job_id).where(Request.job_id == JobRow.id, Request.finished_at > since).correlate(JobRow)
    return tuple(
        session.scalars(
            select(JobRow.id)
            .where(is_serving(), JobRow.model.in_(served), JobRow.created_at < since)
            .where(has_queued_requests() | running.exists(), ~moved.exists(), ~ended.exists())
            .where(~_others_move(since))
            .order_by(JobRow.created_at)
            .limit(20)
        )
    )


def _others_move(since: float) -> ColumnElement[bool]:
    """Return the condition that other jobs make progress: this one may then only wait for its turn."""
    other = select(Partial.job_id).where(Partial.committed_at > since, Partial.job_id != JobRow.id)
    return other.correlate(JobRow).exists()


def _poisoned(session: Session, since: float) -> int:
    """Count poison requests of open and recently ended jobs; requests of other jobs are not read."""
    recent = and_(Request.error_code == "poison", Request.finished_at > since)
    lately = select(JobRow.id).where((JobRow.finished_at > since) | (JobRow.status == "in_progress"))
    return session.scalar(select(func.count()).select_from(Request).where(recent, Request.job_id.in_(lately))) or 0
