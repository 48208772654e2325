"""What the routes need, made once at the edge and handed in: settings, the record, the doorbell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from jobs.errors import NotFound
from jobs.producer import Ring
from jobs.settings import JobsSettings
from storage import queries
from storage.queries import JobView
from storage.session import Database


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of the system behind the routes."""

    settings: JobsSettings
    database: Database
    ring: Ring


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesNow = Annotated[Services, Depends(_services)]


def find_job(services: Services, job_id: str) -> JobView:
    """Return a job, or raise NotFound: the same answer for an id of any look."""
    with services.database.read() as session:
        job = queries.job(session, job_id)
    if job is None:
        raise NotFound(f"There is no job {job_id[:80]!r}.", param="id")
    return job


def _existing_job(job_id: str, services: ServicesNow) -> JobView:
    return find_job(services, job_id)


ExistingJob = Annotated[JobView, Depends(_existing_job)]
