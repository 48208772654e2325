"""Changes of a stored job: its name, labels, priority and concurrency limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from storage.labels import index_again
from storage.models import JobRow


@dataclass(frozen=True, slots=True)
class LockedJob:
    """A job that the transaction has locked, with what may change."""

    id: str
    created_at: float
    name: str | None
    metadata: Mapping[str, str] | None
    interactive: bool


def lock_job(session: Session, job_id: str) -> LockedJob | None:
    """Lock a job and return it; None if it does not exist."""
    columns = (JobRow.id, JobRow.created_at, JobRow.name, JobRow.metadata_, JobRow.priority > 0)
    row = session.execute(select(*columns).where(JobRow.id == job_id).with_for_update(key_share=True)).first()
    return None if row is None else LockedJob(*row)


def change_job(session: Session, job: LockedJob, columns: Mapping[str, Any]) -> None:
    """Set these columns of a locked job (attributes of JobRow), and renew what lists and searches find it by."""
    if not columns:
        return
    session.execute(update(JobRow).where(JobRow.id == job.id).values(**columns))
    if {"name", "metadata_"} & columns.keys():
        name, metadata = columns.get("name", job.name), columns.get("metadata_", job.metadata)
        index_again(session, job.id, job.created_at, name, metadata)
