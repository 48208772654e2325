"""Routes of jobs: submit, list, read, cancel, and the results of one job as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from jobs.api.auth.caller import CurrentCaller
from jobs.api.auth.stream_limits import StreamSlot
from jobs.api.dependencies import CurrentServices, ExistingJob, cancel_job, find_job
from jobs.api.http.body import Body
from jobs.api.routes.job_outputs import CURSOR, followed_lines, output_lines
from jobs.api.schemas import serializers
from jobs.api.schemas.openapi import JOB_BODY
from jobs.api.schemas.replies import EVENTS, JOB, JOBS, LINES, STATISTICS
from jobs.api.submissions import max_body_bytes, read_submission
from jobs.api.write_threads import run_write
from jobs.errors import InvalidValue
from jobs.messages import JobStatus
from jobs.streaming.sse import read_id
from jobs.submission.intake import accept_job, retry_job
from jobs.tracing import submit_span
from storage import queries

router = APIRouter(prefix="/v1/jobs")

ID_PREFIX = "^[A-Za-z0-9_-]{0,64}$"
_RECONNECT = b"retry: 1000\n\n"  # milliseconds until EventSource comes back
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second for nginx


@router.post("", response_model=None, openapi_extra=JOB_BODY, responses=JOB)
async def submit(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Record a job and answer with it."""
    max_bytes = max_body_bytes(request.headers, services.settings)

    def accept(body: Body) -> Response:
        lines = services.settings.max_line_bytes
        with submit_span(request.headers) as place:
            submission = read_submission(body, request.query_params, request.headers, caller.key_id, lines)
            submission = replace(submission, traceparent=place)
            job_id = accept_job(submission, database=services.database, ring=services.ring, settings=services.settings)
        return JSONResponse(serializers.job(find_job(services, job_id, caller)))

    async with services.bodies.received(request, max_bytes) as body:
        return await run_write(accept, body)


@router.get("", response_model=None, responses=JOBS)
def list_jobs(
    services: CurrentServices,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
    interactive: Annotated[bool, Query(description="Also single requests, such as chats.")] = False,
    mine: Annotated[bool, Query(description="Only those of the caller's own key.")] = False,
    id_prefix: Annotated[str, Query(pattern=ID_PREFIX, description="Only those whose id begins so.")] = "",
    order: Literal["asc", "desc"] = "desc",
    status: JobStatus | None = None,
) -> Response:
    """List jobs by the time of their creation, newest first; `after` is the id that ended the page before."""
    with services.database.read() as session:
        if after and queries.job(session, after, caller.sees) is None:
            raise InvalidValue("There is no job of this id to start behind.", param="after")
        owner, newest_first = caller.key_id if mine else caller.sees, order == "desc"
        page = queries.jobs(
            session,
            limit,
            after or None,
            owner,
            interactive,
            id_prefix=id_prefix,
            status=status,
            newest_first=newest_first,
        )
    return JSONResponse(serializers.page([serializers.job(job) for job in page.jobs], page.has_more))


@router.get("/{job_id}", response_model=None, responses=JOB)
async def retrieve(job: ExistingJob) -> Response:
    """Read one job."""
    return JSONResponse(serializers.job(job))


@router.post("/{job_id}/cancel", response_model=None, responses=JOB)
async def cancel(job: ExistingJob, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Cancel a job. May be repeated; a job that ended another way is a conflict."""
    return JSONResponse(serializers.job(await run_write(cancel_job, services, job, caller)))


@router.post("/{job_id}/retry", response_model=None, responses=JOB)
async def retry(
    job: ExistingJob,
    services: CurrentServices,
    caller: CurrentCaller,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Run the requests of an ended job again that have no result: as a new job, whose `retry_of` is this one."""

    def accept() -> Response:
        job_id = retry_job(
            job,
            api_key_id=caller.key_id,
            idempotency_key=idempotency_key,
            database=services.database,
            ring=services.ring,
            settings=services.settings,
        )
        return JSONResponse(serializers.job(find_job(services, job_id, caller)))

    return await run_write(accept)


@router.get("/{job_id}/outputs", response_class=StreamingResponse, dependencies=[StreamSlot], responses=LINES)
def outputs(
    job: ExistingJob,
    services: CurrentServices,
    after: Annotated[int, Query(ge=-1, le=2**31 - 1, description="Index of the request to start behind.")] = -1,
    failed: Annotated[bool, Query(description="Only requests that ended without a result.")] = False,
    follow: Annotated[bool, Query(description="Go on until the job ends, in the order in which requests end.")] = False,
    cursor: Annotated[str, Query(pattern=CURSOR, description="With follow: the line to start behind.")] = "",
) -> StreamingResponse:
    """Stream the requests that have ended as JSON lines, in the order of the job, while it may still run.

    With `follow` the lines come as requests end, each with a `cursor` from which a new call goes on.
    """
    lines = followed_lines(services, job, cursor, failed) if follow else output_lines(services, job, after, failed)
    return StreamingResponse(lines, media_type="application/x-ndjson; charset=utf-8")


@router.get("/{job_id}/stats", response_model=None, responses=STATISTICS)
def statistics(job: ExistingJob, services: CurrentServices) -> Response:
    """Say how fast the job ran and how much speculation paid."""
    with services.database.read() as session:
        return JSONResponse(serializers.statistics(queries.job_stats(session, job.id)))


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    dependencies=[StreamSlot],
    responses=EVENTS | {204: {"description": "The reader has been told everything, and the job has ended."}},
)
async def events(
    job: ExistingJob, services: CurrentServices, last_event_id: Annotated[str | None, Header(max_length=200)] = None
) -> Response:
    """Stream what is written as server-sent events: first what there is, then what comes, until the job ends.

    Every event that tells text has an id. A reader that comes back with it as `Last-Event-ID` is told exactly what it
    has not been told, by whichever shim; an id that is not ours starts over.
    """
    since = await services.broadcast.settle(job.id, read_id(last_event_id))
    if since.status is not None and JobStatus(since.status).final:
        return Response(status_code=204)
    stream = _after(_RECONNECT, services.broadcast.follow(job.id, since))
    return StreamingResponse(stream, media_type="text/event-stream", headers=_STREAM_HEADERS)


async def _after(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Yield what is to be said at once, and then the events."""
    yield first
    async with aclosing(events):
        async for batch in events:
            yield batch
