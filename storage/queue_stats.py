"""Queue metrics by model: requests queued, running and ended, and the load that each live worker reports.

Reads open jobs and their requests; finished requests are only counted through their jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, case, func, select
from sqlalchemy.orm import Session

from storage.dialect import database_now
from storage.models import JobRow, Request, Worker
from storage.records import HEARTBEAT_TIMEOUT_S
from storage.statuses import ACTIVE_JOB_STATUSES, OPEN_REQUEST_STATUSES
from storage.webhooks import deliveries_by_status


@dataclass(frozen=True, slots=True)
class OpenJobs:
    """Open jobs and requests of one model."""

    model: str
    jobs: int
    queued: int  # of jobs that are not paused
    running: int
    paused: int  # queued requests of paused jobs
    oldest_s: float  # age of the oldest open job that is not paused


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of one model over all jobs, ended ones included."""

    model: str
    requests_completed: int
    requests_failed: int
    prompt_tokens: int
    completion_tokens: int
    # Of these: copied from earlier answers.
    requests_cached: int
    cached_prompt_tokens: int
    cached_completion_tokens: int


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A live worker and the load it last reported."""

    id: str
    hostname: str
    model: str
    load: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Jobs, requests, errors, leases and workers, read in one transaction."""

    open_jobs: tuple[OpenJobs, ...]
    totals: tuple[Totals, ...]
    errors: tuple[tuple[str, int], ...]  # (error code, requests that ended with it)
    leases_held: int
    leases_lapsed: int
    workers: tuple[WorkerLoad, ...]
    deliveries: Mapping[str, int]  # of webhooks, by status


def collect(session: Session) -> QueueStats:
    """Return the queue metrics of this moment."""
    now = database_now(session)
    held, lapsed = _leases(session, now)
    return QueueStats(
        _open_jobs(session, now),
        _totals(session),
        _errors(session),
        held,
        lapsed,
        _workers(session, now),
        deliveries_by_status(session),
    )


def _open_jobs(session: Session, now: float) -> tuple[OpenJobs, ...]:
    is_paused, queued = JobRow.paused_at.is_not(None), Request.status == "queued"
    kinds = (and_(queued, ~is_paused), Request.status == "running", and_(queued, is_paused))
    counts = (func.count(case((kind, 1))) for kind in kinds)
    oldest = func.min(case((~is_paused, JobRow.created_at)))
    rows = session.execute(
        select(JobRow.model, func.count(JobRow.id.distinct()), *counts, oldest)
        .outerjoin(Request, and_(Request.job_id == JobRow.id, Request.status.in_(OPEN_REQUEST_STATUSES)))
        .where(JobRow.status.in_(ACTIVE_JOB_STATUSES))
        .group_by(JobRow.model)
        .order_by(JobRow.model)
    )
    return tuple(OpenJobs(*row[:5], 0.0 if row[5] is None else max(0.0, now - row[5])) for row in rows)


def _totals(session: Session) -> tuple[Totals, ...]:
    names = (
        *("requests_completed", "requests_failed", "prompt_tokens", "completion_tokens"),
        *("requests_cached", "cached_prompt_tokens", "cached_completion_tokens"),
    )
    sums = (func.sum(getattr(JobRow, name)) for name in names)
    rows = session.execute(select(JobRow.model, *sums).group_by(JobRow.model).order_by(JobRow.model))
    return tuple(Totals(row[0], *map(int, row[1:])) for row in rows)


def _errors(session: Session) -> tuple[tuple[str, int], ...]:
    rows = session.execute(
        select(Request.error_code, func.count())
        .where(Request.error_code.is_not(None))
        .group_by(Request.error_code)
        .order_by(Request.error_code)
    )
    return tuple((str(code), count) for code, count in rows)


def _leases(session: Session, now: float) -> tuple[int, int]:
    lapsed = func.count(case((Request.lease_expires_at < now, 1)))
    row = session.execute(
        select(func.count(), lapsed)
        .select_from(JobRow)
        .join(Request, and_(Request.job_id == JobRow.id, Request.status == "running"))
        .where(JobRow.status.in_(ACTIVE_JOB_STATUSES))
    ).one()
    return row[0] - row[1], row[1]


def _workers(session: Session, now: float) -> tuple[WorkerLoad, ...]:
    rows = session.execute(
        select(Worker.id, Worker.hostname, Worker.target, Worker.load)
        .where(Worker.stopped_at.is_(None), Worker.last_seen_at > now - HEARTBEAT_TIMEOUT_S)
        .order_by(Worker.started_at, Worker.id)
    )
    return tuple(WorkerLoad(row[0], row[1], row[2], row[3] or {}) for row in rows)
