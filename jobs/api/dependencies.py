"""Dependencies of the routes: the services of the application, and the job that a path names."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Annotated, Literal, cast

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Connection
from sqlalchemy.orm import Session
from starlette.types import Scope

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.http.body import BodyReader
from jobs.errors import BudgetSpent, IsInteractive, JobEnded, NotCancellable, NotDeletable, NotFound
from jobs.messages import JobStatus
from jobs.producer import Notify
from jobs.reports.progress import elapsed_s
from jobs.settings import JobsSettings
from jobs.streaming.hub import EventHub
from storage import erasure, queries, webhooks, writes
from storage.budgets import BY_TOKENS, spent_budget
from storage.dialect import database_now
from storage.pausing import pause_job, resume_job
from storage.prune import paced
from storage.queries import JobView
from storage.session import Database

_SCOPE_KEY = "basic.job"  # of the prefetched job
_JOB_PATH = re.compile(r"/v1/jobs/(?P<job_id>[^/]+)(?:/|$)")
_ERASE_S = 2.0  # of a call
_CANCELLED = frozenset({JobStatus.CANCELLING, JobStatus.CANCELLED})


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes share in one application."""

    settings: JobsSettings
    database: Database
    notify: Notify
    bodies: BodyReader
    hub: EventHub


async def _services(request: Request) -> Services:  # async: a plain function would take a thread
    return cast(Services, request.app.state.services)


CurrentServices = Annotated[Services, Depends(_services)]


def find_job(services: Services, job_id: str, caller: Caller) -> JobView:
    """Return a job; raise NotFound for unknown ids and, alike, for jobs that the caller may not see."""
    with services.database.connect() as session:
        job = queries.job(session, job_id, caller.sees)
    if job is None:
        raise _no_job(job_id)
    return job


def cancel_job(services: Services, job: JobView, caller: Caller, noun: str = "job") -> JobView:
    """Request the cancellation of a job and return the job; raise NotCancellable if it has ended otherwise."""
    with services.database.write() as session:
        status = writes.request_cancel(session, job.id)
    if status is not None and JobStatus(status) not in _CANCELLED:
        raise NotCancellable(f"Cannot cancel a {noun} with status '{status}'.")
    return find_job(services, job.id, caller)


def pause_or_resume(services: Services, job: JobView, caller: Caller, act: Literal["pause", "resume"]) -> JobView:
    """Pause or resume a job, and return it; raise JobEnded if it has no requests left to run."""
    with services.database.write() as session:
        if act == "resume":
            _require_budget(session, job)
        done = pause_job(session, job.id) if act == "pause" else resume_job(session, job.id)
    found = find_job(services, job.id, caller)
    if not done:
        if found.status == JobStatus.IN_PROGRESS:
            raise IsInteractive
        raise JobEnded(f"Cannot {act} a job with status '{found.status}'.")
    if act == "resume":
        services.notify(job.id, job.model)
    return found


def delete_job(services: Services, job: JobView, *, cancel: bool = False, noun: str = "job") -> None:
    """Hide a job that has ended and erase what it holds; the pruner erases its row, and the rest of a large one.

    With `cancel`, one that still runs is cancelled, and erased as soon as it has ended; else raise NotDeletable.
    """
    with services.database.write() as session:
        status = webhooks.lock_status(session, job.id)
        if status is not None and not JobStatus(status).final:
            if not cancel:
                raise NotDeletable(
                    f"The {noun} is {status}. Cancel it or wait until it has ended, then delete it; "
                    "?cancel=true does both (basic rm --cancel)."
                )
            status = writes.request_cancel(session, job.id)
        erasure.hide_job(session, job.id)
    if status is not None and JobStatus(status).final:
        ends_at = time.monotonic() + _ERASE_S
        for _ in paced(erasure.erase_contents(services.database, job.id)):
            if time.monotonic() > ends_at:
                return  # the pruner continues


def _require_budget(session: Session, job: JobView) -> None:
    """Raise BudgetSpent if a paused job would pause again at once."""
    reason = spent_budget(session, job.id, database_now(session)) if job.status == JobStatus.PAUSED else None
    if reason is None:
        return
    name, option = ("tokens", "--budget-tokens") if reason == BY_TOKENS else ("seconds", "--budget-seconds")
    cached = job.cached_prompt_tokens + job.cached_completion_tokens
    tokens = job.prompt_tokens + job.completion_tokens - cached
    spent = tokens if reason == BY_TOKENS else round(elapsed_s(job), 1)
    limit = job.budget_tokens if reason == BY_TOKENS else job.budget_s
    raise BudgetSpent(
        f"The job has spent {spent} of its budget of {limit} {name}. Raise it: basic resume {job.id} {option} N, "
        f'or PATCH /v1/jobs/{job.id} with {{"budget": {{"{name}": N}}}}. Null removes it.',
        param=f"budget.{name}",
    )


def prefetch_job(scope: Scope, caller: Caller, connection: Connection) -> None:
    """Read the job of a `GET /v1/jobs/{job_id}…` in the connection that checks the key, and store it for the route."""
    found = _JOB_PATH.match(scope["path"]) if scope["method"] == "GET" else None
    if found is not None:
        scope[_SCOPE_KEY] = (found["job_id"], caller, queries.job(connection, found["job_id"], caller.sees))


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
