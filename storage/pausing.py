"""Pause and resume jobs.

A paused job has `paused_at`; its `status` stays. None of its requests is claimed, and the next flush of each worker
commits the progress of those that run and returns them to the queue (storage.progress.flush). After `resume_job` they
continue from their committed tokens, with the same text. The completion window does not stop.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Case, and_, case, select, update
from sqlalchemy.orm import Session

from storage.dialect import database_now
from storage.models import JobRow
from storage.pilots import BY_PILOT, pause_after_pilot
from storage.statuses import PAUSABLE_JOB_STATUSES, JobStatus

BY_USER: Final = "user"  # the reason of a pause that a caller asked for


def shown_status(jobs: Any) -> Case[str]:
    """Return the status of a job for readers: `paused` while it is in progress and paused. `jobs`: its columns."""
    paused = and_(jobs.status == JobStatus.IN_PROGRESS, jobs.paused_at.is_not(None))
    return case((paused, JobStatus.PAUSED.value), else_=jobs.status)


def pause_job(session: Session, job_id: str, reason: str = BY_USER) -> bool:
    """Pause a job; False if it can't be: it has no request left to run, is being cancelled, or is interactive.

    A paused job keeps its first reason. A batch that is validating is read to its end, and then paused.
    """
    now = database_now(session)
    running = update(JobRow).where(_is_pausable(job_id), JobRow.paused_at.is_(None))
    session.execute(running.values(paused_at=now, pause_reason=reason))
    return _exists(session, job_id)


def resume_job(session: Session, job_id: str) -> bool:
    """Resume a job; False if it can't. A job that is not paused stays as it is. Notify workers after the commit."""
    now = database_now(session)
    paused = update(JobRow).where(_is_pausable(job_id), JobRow.paused_at.is_not(None))
    since = case((JobRow.started_at > JobRow.paused_at, JobRow.started_at), else_=JobRow.paused_at)
    paused_s = JobRow.paused_s + case((JobRow.started_at.is_not(None), now - since), else_=0.0)
    only_pilot = and_(JobRow.pilot_only, JobRow.pause_reason != BY_PILOT)  # a paused pilot continues
    session.execute(
        paused.values(paused_at=None, pause_reason=None, doorbell_at=now, paused_s=paused_s, pilot_only=only_pilot)
    )
    pause_after_pilot(session, [job_id])  # its pilot may have ended meanwhile
    return _exists(session, job_id)


def _is_pausable(job_id: str) -> Any:
    return and_(JobRow.id == job_id, JobRow.status.in_(PAUSABLE_JOB_STATUSES), JobRow.priority == 0)


def _exists(session: Session, job_id: str) -> bool:
    return session.scalar(select(JobRow.id).where(_is_pausable(job_id))) is not None
