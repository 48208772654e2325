"""Routes of jobs: submit, list, read, cancel, and the results of one job as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from jobs.api import views
from jobs.api.bodies import Body
from jobs.api.caller import CallerNow
from jobs.api.document import JOB_BODY
from jobs.api.services import ExistingJob, Services, ServicesNow, cancel_job, find_job
from jobs.api.streams import StreamPlace
from jobs.api.submissions import most_bytes, read_submission
from jobs.errors import InvalidValue
from jobs.intake import accept_job
from jobs.messages import PartialEvent
from jobs.partials import follow
from jobs.snapshots import read_events
from storage import queries
from storage.queries import OutputView

router = APIRouter(prefix="/v1/jobs")

_OUTPUTS_AT_ONCE = 200


@router.post("", openapi_extra=JOB_BODY)
async def submit(
    request: Request, background: BackgroundTasks, services: ServicesNow, caller: CallerNow
) -> dict[str, Any]:
    """Record a job and answer with it. The doorbell rings afterwards: a queue that is away does not delay the reply."""
    most = most_bytes(request.headers, services.settings)

    def ring_later(job_id: str, model: str) -> None:
        background.add_task(services.ring, job_id, model)

    def accept(body: Body) -> dict[str, Any]:
        lines = services.settings.max_line_bytes
        submission = read_submission(body, request.query_params, request.headers, caller.key_id, lines)
        job_id = accept_job(submission, database=services.database, ring=ring_later, settings=services.settings)
        return views.job(find_job(services, job_id, caller))

    async with services.bodies.received(request, most) as body:
        return await run_in_threadpool(accept, body)


@router.get("")
def list_jobs(
    services: ServicesNow,
    caller: CallerNow,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
    interactive: Annotated[bool, Query(description="Also single requests, such as chats.")] = False,
) -> dict[str, Any]:
    """List jobs, newest first; `after` is the id that ended the page before."""
    with services.database.read() as session:
        if after is not None and queries.job(session, after, caller.sees) is None:
            raise InvalidValue("There is no job of this id to start behind.", param="after")
        page = queries.jobs(session, limit=limit, after=after, owner=caller.sees, interactive=interactive)
    return views.page([views.job(job) for job in page.jobs], page.has_more)


@router.get("/{job_id}")
def retrieve(job: ExistingJob) -> dict[str, Any]:
    """Read one job."""
    return views.job(job)


@router.post("/{job_id}/cancel")
def cancel(job: ExistingJob, services: ServicesNow, caller: CallerNow) -> dict[str, Any]:
    """Cancel a job. May be repeated; a job that ended another way is a conflict."""
    return views.job(cancel_job(services, job, caller))


@router.get("/{job_id}/outputs", dependencies=[StreamPlace])
def outputs(
    job: ExistingJob, services: ServicesNow, after: Annotated[int, Query(ge=-1, le=2**31 - 1)] = -1
) -> StreamingResponse:
    """Stream the finished requests as JSON lines, in the order of the job; `after` is the index to start behind."""
    return StreamingResponse(_output_lines(services, job.id, after), media_type="application/x-ndjson; charset=utf-8")


@router.get("/{job_id}/stats")
def statistics(job: ExistingJob, services: ServicesNow) -> dict[str, Any]:
    """Say how fast the job ran and how much speculation paid."""
    with services.database.read() as session:
        return views.statistics(queries.job_stats(session, job.id))


@router.get("/{job_id}/events", response_class=EventSourceResponse, dependencies=[StreamPlace])
async def events(job: ExistingJob, services: ServicesNow) -> AsyncGenerator[ServerSentEvent]:
    """Stream what is written: first all text so far, then new text, until the job ends. Reconnecting starts over."""

    async for event in follow(job.id, services.settings.redis_url, lambda: read_events(services.database, job.id)):
        yield _server_sent(event)


def _server_sent(event: PartialEvent) -> ServerSentEvent:
    place = "job" if event.index is None else f"{event.index}.{event.choice}.{event.seq}"
    return ServerSentEvent(id=place, event=event.type, raw_data=event.model_dump_json(exclude_none=True))


def _output_lines(services: Services, job_id: str, after: int) -> Iterator[str]:
    while page := _output_page(services, job_id, after):
        for output in page:
            yield json.dumps(views.output(output), ensure_ascii=False) + "\n"
        after = page[-1].request_index


def _output_page(services: Services, job_id: str, after: int) -> list[OutputView]:
    """Read some outputs at once: a reader may be slow, and must not hold a connection meanwhile."""
    with services.database.read() as session:
        return list(islice(queries.outputs(session, job_id, after_index=after), _OUTPUTS_AT_ONCE))
