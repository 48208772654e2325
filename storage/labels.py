"""Names and labels of jobs, as rows that lists and searches use as an index.

Labels are the pairs of a job's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, insert
from sqlalchemy.orm import Session

from storage.dialect import storable
from storage.models import JobLabel, JobText


def index_job(
    session: Session, job_id: str, created_at: float, name: str | None, labels: Mapping[str, str] | None
) -> None:
    """Write the labels of a new job, and the text by which a search finds it. Without name and labels there is none."""
    pairs = _pairs(labels)
    rows = [{"job_id": job_id, "key": key, "value": value, "created_at": created_at} for key, value in pairs.items()]
    if rows:
        session.execute(insert(JobLabel), rows)
    if name or pairs:
        session.execute(insert(JobText), [{"job_id": job_id, "text": _text(name, pairs)}])


def index_again(
    session: Session, job_id: str, created_at: float, name: str | None, labels: Mapping[str, str] | None
) -> None:
    """Replace the rows of a job whose name or labels have changed, and that the caller has locked."""
    for rows in (JobLabel, JobText):
        session.execute(delete(rows).where(rows.job_id == job_id))
    index_job(session, job_id, created_at, name, labels)


def _pairs(labels: Mapping[str, str] | None) -> dict[str, str]:
    return {storable(key): storable(value) for key, value in (labels or {}).items()}


def _text(name: str | None, pairs: Mapping[str, str]) -> str:
    """Return what a search reads. The database could not fold the case of all letters."""
    return "\n".join([name or "", *(f"{key}={value}" for key, value in pairs.items())]).casefold()
