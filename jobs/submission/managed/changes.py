"""Change the name, labels, priority, concurrency limit and budget of a stored job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from jobs.errors import InvalidValue, IsInteractive, JobEnded, NotFound
from jobs.messages import JobStatus
from jobs.submission.managed.budget import budget_columns
from jobs.submission.managed.fields import MANAGED_FIELDS, check_max_concurrent, check_name, check_priority
from jobs.submission.managed.labels import changed_labels
from jobs.submission.values import refuse_unknown
from storage import job_changes
from storage.queries import JobView
from storage.session import Database

_OF_OPEN_JOBS: Final = frozenset({"priority", "max_concurrent", "budget"})


def change_job(job: JobView, fields: Mapping[str, Any], database: Database) -> None:
    """Change the fields of a job that are given; null removes one. Labels that are not named stay.

    Raise RequestRefused for invalid values, IsInteractive, and JobEnded if an ended job would get a priority.
    """
    refuse_unknown(fields, MANAGED_FIELDS)
    if not fields:
        raise InvalidValue("Give at least one of name, labels, priority, max_concurrent and budget.")
    ended_with = sorted(_OF_OPEN_JOBS & fields.keys())
    if ended_with and JobStatus(job.status).final:
        raise JobEnded(f"The job is {job.status}: {ended_with[0]} has no effect any more.", param=ended_with[0])
    columns: dict[str, Any] = {}
    if "name" in fields:
        columns["name"] = None if fields["name"] is None else check_name(fields["name"])
    if "priority" in fields:
        columns["priority_class"] = check_priority(fields["priority"]).rank
    if "max_concurrent" in fields:
        columns["max_concurrent"] = check_max_concurrent(fields["max_concurrent"])
    if "budget" in fields:
        columns |= budget_columns(fields["budget"])
    with database.write() as session:
        stored = job_changes.lock_job(session, job.id)
        if stored is None:
            raise NotFound(f"There is no job {job.id!r}.", param="id")
        if stored.interactive:
            raise IsInteractive
        if "labels" in fields:
            columns["metadata_"] = changed_labels(stored.metadata, fields["labels"])
        job_changes.change_job(session, stored, columns)
