"""Routes of jobs: submit, list, read, cancel, delete, retry, and stream outputs and events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import IO, Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.auth.stream_limits import StreamSlot
from jobs.api.dependencies import (
    CurrentServices,
    ExistingJob,
    Services,
    cancel_job,
    delete_job,
    find_job,
    pause_or_resume,
)
from jobs.api.http.body import Body
from jobs.api.http.event_stream import event_stream
from jobs.api.http.stored_file import open_stored
from jobs.api.routes.job_outputs import CURSOR, OutputSource
from jobs.api.schemas import serializers
from jobs.api.schemas.openapi import CHANGES_BODY, ERRORS, JOB_BODY
from jobs.api.schemas.replies import JobDeleted
from jobs.api.schemas.route_responses import (
    EVENTS,
    JOB,
    JOB_CHECK,
    JOB_ESTIMATE,
    JOBS,
    LINES,
    STATISTICS,
    responses,
)
from jobs.api.submissions import json_changes, max_body_bytes, read_label, read_submission, require_json
from jobs.api.write_threads import run_write
from jobs.errors import InvalidValue, NoPilot, NotFound, PilotRunning
from jobs.messages import JobStatus
from jobs.reports.pilot.estimate import estimate
from jobs.reports.pilot.record import pilot_of, power_of
from jobs.streaming.sse import decode_cursor
from jobs.submission.checking import check_job
from jobs.submission.intake import Submission, create_job, retry_job
from jobs.submission.managed.changes import change_job
from jobs.tracing import submit_span
from storage import files, queries
from storage.job_filter import JobFilter
from storage.pilots import read_pilot

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=ERRORS)

ID_PREFIX = "^[A-Za-z0-9_-]{0,64}$"
MAX_SEARCH_CHARS = 512
_MAX_CHANGES_BYTES = 65_536  # enough for the largest labels
_RECONNECT = b"retry: 1000\n\n"  # ms until EventSource reconnects


@router.post("", response_model=None, openapi_extra=JOB_BODY, responses=JOB)
async def submit(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Create a job."""
    max_bytes = max_body_bytes(request.headers, services.settings)

    def accept(body: Body) -> Response:
        with submit_span(request.headers) as traceparent:
            submission = replace(_read(body, request, services, caller), traceparent=traceparent)
            job_id = create_job(
                submission, database=services.database, notify=services.notify, settings=services.settings
            )
        return JSONResponse(serializers.job(find_job(services, job_id, caller)))

    async with services.bodies.received(request, max_bytes) as body:
        return await run_write(accept, body)


@router.post("/check", response_model=None, openapi_extra=JOB_BODY, responses=JOB_CHECK)
async def check(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Check a submission and store nothing: requests, tokens, and what would be refused."""
    max_bytes = max_body_bytes(request.headers, services.settings)

    def accept(body: Body) -> Response:
        submission = _read(body, request, services, caller)
        return JSONResponse(
            serializers.check(check_job(submission, database=services.database, settings=services.settings))
        )

    async with services.bodies.received(request, max_bytes) as body:
        return await run_write(accept, body)


def _read(body: Body, request: Request, services: Services, caller: Caller) -> Submission:
    return read_submission(
        body,
        request.query_params,
        request.headers,
        caller.key_id,
        services.settings.max_line_bytes,
        lambda file_id: _open_file(services, caller, file_id),
    )


def _open_file(services: Services, caller: Caller, file_id: str) -> IO[bytes]:
    with services.database.read() as session:
        file = files.file(session, file_id, caller.sees)
    if file is None:
        raise NotFound(f"There is no file {file_id[:80]!r}.", param="input_file_id")
    return open_stored(services.database, file.id)


@router.get("", response_model=None, responses=JOBS)
def list_jobs(
    services: CurrentServices,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
    interactive: Annotated[bool, Query(description="Include single requests, such as chat completions.")] = False,
    mine: Annotated[bool, Query(description="Only jobs of the caller's own key.")] = False,
    id_prefix: Annotated[str, Query(pattern=ID_PREFIX, description="Only jobs whose id starts with this.")] = "",
    order: Literal["asc", "desc"] = "desc",
    status: Annotated[list[JobStatus] | None, Query(description="Only jobs with one of these statuses.")] = None,
    label: Annotated[
        list[str] | None,
        Query(description="Only jobs with these labels: `team=search`, or `team` for any value."),
    ] = None,
    name: Annotated[str | None, Query(description="Only jobs with this name.")] = None,
    model: Annotated[str | None, Query(description="Only jobs of this model.")] = None,
    search: Annotated[
        str, Query(max_length=MAX_SEARCH_CHARS, description="Only jobs with this text in the name or a label.")
    ] = "",
) -> Response:
    """List jobs by creation time, newest first unless `order` is `asc`. `after`: last id of the page before.

    Filters add up: a job must meet all of them.
    """
    with services.database.read() as session:
        if after and queries.job(session, after, caller.sees) is None:
            raise InvalidValue("Unknown job id in `after`.", param="after")
        owner, newest_first = caller.key_id if mine else caller.sees, order == "desc"
        wanted = JobFilter(
            owner,
            interactive,
            id_prefix=id_prefix,
            statuses=tuple(status or ()),
            labels=tuple(map(read_label, label or ())),
            name=name,
            model=model,
            search=search,
        )
        page = queries.jobs(session, limit, after or None, wanted, newest_first=newest_first)
    return JSONResponse(serializers.page([serializers.job(job) for job in page.jobs], page.has_more))


@router.get("/{job_id}", response_model=None, responses=JOB)
async def retrieve(job: ExistingJob) -> Response:
    """Read one job."""
    return JSONResponse(serializers.job(job))


@router.patch("/{job_id}", response_model=None, openapi_extra=CHANGES_BODY, responses=JOB)
async def change(job: ExistingJob, request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Change the name, labels, priority or concurrency limit of a job; null removes one. Other labels stay."""
    require_json(request.headers)

    def accept(body: Body) -> Response:
        change_job(job, json_changes(body.open().read()), services.database)
        services.notify(job.id, job.model)  # it may run more requests now
        return JSONResponse(serializers.job(find_job(services, job.id, caller)))

    async with services.bodies.received(request, _MAX_CHANGES_BYTES) as body:
        return await run_write(accept, body)


@router.post("/{job_id}/pause", response_model=None, responses=JOB)
async def pause(job: ExistingJob, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Pause a job. May be repeated; 409 if it has ended.

    Its running requests return to the queue with their text so far, and continue from there. Its completion window does
    not stop.
    """
    return JSONResponse(serializers.job(await run_write(pause_or_resume, services, job, caller, "pause")))


@router.post("/{job_id}/resume", response_model=None, responses=JOB)
async def resume(job: ExistingJob, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Resume a paused job, with the same texts as without the pause. May be repeated; 409 if it has ended."""
    return JSONResponse(serializers.job(await run_write(pause_or_resume, services, job, caller, "resume")))


@router.post("/{job_id}/cancel", response_model=None, responses=JOB)
async def cancel(job: ExistingJob, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Cancel a job. May be repeated; 409 if the job has ended otherwise."""
    return JSONResponse(serializers.job(await run_write(cancel_job, services, job, caller)))


@router.delete("/{job_id}", response_model=None, responses=responses(JobDeleted, 404, 409))
async def delete(
    job: ExistingJob,
    services: CurrentServices,
    cancel: Annotated[bool, Query(description="Cancel the job first, if it still runs.")] = False,
) -> Response:
    """Erase a job that has ended: prompts, outputs, steps, and files that no other job reads. 409 if it still runs."""
    await run_write(delete_job, services, job, cancel=cancel)
    return JSONResponse({"id": job.id, "object": "job", "deleted": True})


@router.post("/{job_id}/retry", response_model=None, responses=JOB)
async def retry(
    job: ExistingJob,
    services: CurrentServices,
    caller: CurrentCaller,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Run the requests without a result again, as a new job whose `retry_of` is this one. The job must have ended."""

    def accept() -> Response:
        job_id = retry_job(
            job,
            api_key_id=caller.key_id,
            idempotency_key=idempotency_key,
            database=services.database,
            notify=services.notify,
            settings=services.settings,
        )
        return JSONResponse(serializers.job(find_job(services, job_id, caller)))

    return await run_write(accept)


@router.get("/{job_id}/outputs", response_class=StreamingResponse, dependencies=[StreamSlot], responses=LINES)
def outputs(
    job: ExistingJob,
    services: CurrentServices,
    after: Annotated[int, Query(ge=-1, le=2**31 - 1, description="Start after the request with this index.")] = -1,
    failed: Annotated[bool, Query(description="Only requests that ended without a result.")] = False,
    follow: Annotated[
        bool, Query(description="Stream until the job ends, in the order in which requests end.")
    ] = False,
    cursor: Annotated[
        str, Query(pattern=CURSOR, description="With follow: start after the line with this cursor.")
    ] = "",
    prompt: Annotated[bool, Query(description="Add the prompt of each request: a text, or its messages.")] = False,
) -> StreamingResponse:
    """Stream the requests that have ended as JSON lines, in the order of the job. The job may still run.

    With `follow`, stream lines as requests end, each with a `cursor` to resume from.
    """
    source = OutputSource(services, job, failed=failed, with_prompt=prompt)
    lines = source.followed(cursor) if follow else source.lines(after)
    return StreamingResponse(lines, media_type="application/x-ndjson; charset=utf-8")


@router.get("/{job_id}/estimate", response_model=None, responses=JOB_ESTIMATE)
def estimate_job(job: ExistingJob, services: CurrentServices) -> Response:
    """Predict tokens, time and energy of a job from its pilot. 409 until the pilot has ended, or without one."""
    with services.database.read() as session:
        record = read_pilot(session, job.id)
        workers = queries.live_workers_of(session, job.model)
    if record is None:
        raise NoPilot
    if record.open:
        raise PilotRunning(f"The pilot is running: {record.open} of its {record.requests} requests are open.")
    pilot = pilot_of(record, workers)
    found = estimate(pilot)
    if found is None:
        raise NoPilot("No request of the pilot has completed, so nothing can be predicted.")
    _, power_source = power_of(workers)
    return JSONResponse(serializers.job_estimate(job.id, record, pilot, found, power_source))


@router.get("/{job_id}/stats", response_model=None, responses=STATISTICS)
def statistics(job: ExistingJob, services: CurrentServices) -> Response:
    """Return speed and speculation statistics of the job."""
    with services.database.read() as session:
        return JSONResponse(serializers.statistics(queries.job_stats(session, job.id)))


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    dependencies=[StreamSlot],
    responses=EVENTS | {204: {"description": "The job has ended, and the client has all events."}},
)
async def events(
    job: ExistingJob, services: CurrentServices, last_event_id: Annotated[str | None, Header(max_length=200)] = None
) -> Response:
    """Stream the job's text as server-sent events: all text so far, then new text, until the job ends.

    A client that reconnects with `Last-Event-ID`, to any API server, receives every event after that id, once. An
    unknown id starts from the beginning.
    """
    cursor = await services.hub.validate_cursor(job.id, decode_cursor(last_event_id))
    if cursor.status is not None and JobStatus(cursor.status).final:
        return Response(status_code=204)
    stream = _prepend(_RECONNECT, services.hub.follow(job.id, cursor))
    return event_stream(stream)


async def _prepend(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Yield `first`, then the events."""
    yield first
    async with aclosing(events):
        async for batch in events:
            yield batch
