"""What the routes need, made once at the edge and handed in: settings, the record, the doorbell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from jobs.api.bodies import BodyReader
from jobs.api.caller import Caller, CallerNow
from jobs.broadcast import Broadcast
from jobs.errors import NotCancellable, NotFound
from jobs.messages import JobStatus
from jobs.producer import Ring
from jobs.settings import JobsSettings
from storage import queries, writes
from storage.queries import JobView
from storage.session import Database

_CANCEL_ANSWERS = frozenset({JobStatus.CANCELLING, JobStatus.CANCELLED})


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of the system behind the routes."""

    settings: JobsSettings
    database: Database
    ring: Ring
    bodies: BodyReader
    broadcast: Broadcast


async def _services(request: Request) -> Services:  # async: what does not wait needs no thread
    return cast(Services, request.app.state.services)


ServicesNow = Annotated[Services, Depends(_services)]


def find_job(services: Services, job_id: str, caller: Caller) -> JobView:
    """Return a job, or raise NotFound: the same answer for an id of any look, and for other people's jobs."""
    with services.database.look() as session:
        job = queries.job(session, job_id, caller.sees)
    if job is None:
        raise NotFound(f"There is no job {job_id[:80]!r}.", param="id")
    return job


def cancel_job(services: Services, job: JobView, caller: Caller, noun: str = "job") -> JobView:
    """Cancel a job and return it as it stands then; raise NotCancellable if it has ended another way."""
    with services.database.write() as session:
        status = writes.request_cancel(session, job.id)
    if status is not None and JobStatus(status) not in _CANCEL_ANSWERS:
        raise NotCancellable(f"Cannot cancel a {noun} with status '{status}'.")
    return find_job(services, job.id, caller)


def _existing_job(job_id: str, services: ServicesNow, caller: CallerNow) -> JobView:
    return find_job(services, job_id, caller)


ExistingJob = Annotated[JobView, Depends(_existing_job)]
