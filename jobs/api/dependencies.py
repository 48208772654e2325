"""What the routes need, made once at the edge and handed in: settings, the record, the doorbell."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Connection
from starlette.types import Scope

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.http.body import BodyReader
from jobs.errors import NotCancellable, NotFound
from jobs.messages import JobStatus
from jobs.producer import Ring
from jobs.settings import JobsSettings
from jobs.streaming.hub import Broadcast
from storage import queries, writes
from storage.queries import JobView
from storage.session import Database

_SCOPE_KEY = "basic.job"  # of what was read ahead
_ABOUT_JOB = re.compile(r"/v1/jobs/(?P<job_id>[^/]+)(?:/|$)")
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


CurrentServices = Annotated[Services, Depends(_services)]


def find_job(services: Services, job_id: str, caller: Caller) -> JobView:
    """Return a job, or raise NotFound: the same answer for an id of any look, and for other people's jobs."""
    with services.database.connect() as session:
        job = queries.job(session, job_id, caller.sees)
    if job is None:
        raise _no_job(job_id)
    return job


def cancel_job(services: Services, job: JobView, caller: Caller, noun: str = "job") -> JobView:
    """Cancel a job and return it as it stands then; raise NotCancellable if it has ended another way."""
    with services.database.write() as session:
        status = writes.request_cancel(session, job.id)
    if status is not None and JobStatus(status) not in _CANCEL_ANSWERS:
        raise NotCancellable(f"Cannot cancel a {noun} with status '{status}'.")
    return find_job(services, job.id, caller)


def prefetch_job(call: Scope, caller: Caller, connection: Connection) -> None:
    """Read the job that a call is about while its caller is let in, and hand it to the route; or that there is none."""
    found = _ABOUT_JOB.match(call["path"]) if call["method"] == "GET" else None
    if found is not None:
        call[_SCOPE_KEY] = (found["job_id"], caller, queries.job(connection, found["job_id"], caller.sees))


async def _existing_job(request: Request, job_id: str, services: CurrentServices, caller: CurrentCaller) -> JobView:
    read_id, reader, job = request.scope.get(_SCOPE_KEY, ("", None, None))
    if (read_id, reader) != (job_id, caller):
        return await run_in_threadpool(find_job, services, job_id, caller)
    if job is None:
        raise _no_job(job_id)
    return cast(JobView, job)


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id[:80]!r}.", param="id")


ExistingJob = Annotated[JobView, Depends(_existing_job)]
