"""Connect to the service and find the job that a command names."""

from __future__ import annotations

import re

from jobs.client import Client, Job
from jobs.control_characters import safe
from jobs.errors import InvalidValue, NotFound

NO_JOB = "There is no job yet. Submit one with: basic submit FILE.jsonl"
_PATIENCE_S = 8.0  # without a running service, a command fails after this time
_JOB_ID = re.compile(r"batch_[0-9a-f]{32}")
_ID_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what the API accepts
_MAX_LISTED_IDS = 5  # in one error message


def connect() -> Client:
    """Return a client of the service."""
    return Client(patience_s=_PATIENCE_S)


def find_job(client: Client, job: str | None) -> Job:
    """Return the job with this id or id prefix; for None, the newest job of the caller."""
    if job is None:
        newest = client.jobs(limit=1, mine=True)
        if not newest:
            raise NotFound(NO_JOB)
        return client.job(newest[0].id)
    if _JOB_ID.fullmatch(job):
        return client.job(job)
    listed = client.jobs(limit=_MAX_LISTED_IDS, id_prefix=job) if _ID_PREFIX.fullmatch(job) else []
    ids = [found.id for found in listed]
    for job_id in ids if len(ids) == 1 else [job_id for job_id in ids if job_id == job]:
        return client.job(job_id)
    if ids:
        raise InvalidValue(f"More than one job id begins with {safe(job)!r}: {', '.join(ids)}. Give more of the id.")
    raise NotFound(f"There is no job whose id begins with {safe(job[:80])!r}. List jobs with: basic jobs")
