"""Routes of batches, in OpenAI's format: create, list, read, cancel. A batch is a job with the same id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.dependencies import CurrentServices, cancel_job, find_job
from jobs.api.http.body import Body
from jobs.api.http.multipart import read_expires_after_s
from jobs.api.schemas import serializers
from jobs.api.schemas.openapi import BATCH_BODY, ERRORS
from jobs.api.schemas.replies import BatchPage, BatchReply, BatchStatus
from jobs.api.schemas.route_responses import responses
from jobs.api.submissions import IDEMPOTENCY_KEY, json_object, read_endpoint, read_window_s, require_json
from jobs.api.write_threads import run_write
from jobs.errors import InvalidValue, MissingParameter, NotFound, UnknownParameter
from jobs.messages import JobStatus
from jobs.submission.batches import BatchSubmission, create_batch
from jobs.submission.managed.fields import MANAGED_FIELDS, Managed
from jobs.submission.values import refuse_unknown
from jobs.tracing import submit_span
from storage import queries
from storage.job_filter import JobFilter
from storage.queries import JobView

router = APIRouter(prefix="/v1/batches", tags=["batches"], responses=ERRORS)

_MAX_BODY_BYTES = 65_536  # enough for the largest metadata
_OPENAI_FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})
_FIELDS = _OPENAI_FIELDS | MANAGED_FIELDS | {"compare_plain"}
_NO_PILOT = (
    "A batch has no pilot: clients of batches would wait for one that is paused. Submit the same file with "
    "POST /v1/jobs: input_file_id and pilot."
)


@router.post("", response_model=None, openapi_extra=BATCH_BODY, responses=responses(BatchReply, 400, 404, 409))
async def create(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Create a batch from an uploaded file. Its status is `validating` until the lines are read."""
    require_json(request.headers)

    def accept(body: Body) -> Response:
        with submit_span(request.headers) as traceparent:
            batch = replace(
                _read_submission(body, request.headers.get(IDEMPOTENCY_KEY), caller), traceparent=traceparent
            )
            batch_id = create_batch(batch, caller.sees, services.database, services.settings)
        return JSONResponse(serializers.batch(find_job(services, batch_id, caller)))

    async with services.bodies.received(request, _MAX_BODY_BYTES) as body:
        return await run_write(accept, body)


@router.get("", response_model=None, responses=responses(BatchPage, 400))
def list_batches(
    services: CurrentServices,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
    order: Literal["asc", "desc"] = "desc",
    status: BatchStatus | None = None,
) -> Response:
    """List batches by creation time, newest first unless `order` is `asc`. `after`: last id of the page before."""
    with services.database.read() as session:
        if after and not _is_batch(queries.job(session, after, caller.sees)):
            raise InvalidValue("Unknown batch id in `after`.", param="after")
        newest_first = order == "desc"
        wanted = JobFilter(caller.sees, batches_only=True, statuses=_statuses(status))
        page = queries.jobs(session, limit, after or None, wanted, newest_first=newest_first)
    return JSONResponse(serializers.page([serializers.batch(job) for job in page.jobs], page.has_more))


def _existing_batch(batch_id: str, services: CurrentServices, caller: CurrentCaller) -> JobView:
    with services.database.read() as session:
        job = queries.job(session, batch_id, caller.sees)
    if job is None or not _is_batch(job):
        raise NotFound(f"There is no batch {batch_id[:80]!r}.", param="id")
    return job


ExistingBatch = Annotated[JobView, Depends(_existing_batch)]


@router.get("/{batch_id}", response_model=None, responses=responses(BatchReply, 404))
async def retrieve(batch: ExistingBatch) -> Response:
    """Read one batch."""
    return JSONResponse(serializers.batch(batch))


@router.post("/{batch_id}/cancel", response_model=None, responses=responses(BatchReply, 404, 409))
async def cancel(batch: ExistingBatch, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Cancel a batch; finished requests are delivered. May be repeated; 409 if the batch has ended otherwise."""
    return JSONResponse(serializers.batch(await run_write(cancel_job, services, batch, caller, "batch")))


def _statuses(status: str | None) -> tuple[str, ...]:
    """Return the statuses of jobs whose batches have a status: OpenAI knows no `paused`."""
    paused = (JobStatus.PAUSED,) if status == JobStatus.IN_PROGRESS else ()
    return () if status is None else (status, *paused)


def _is_batch(job: JobView | None) -> bool:
    return job is not None and job.input_file_id is not None


def _read_submission(body: Body, idempotency_key: str | None, caller: Caller) -> BatchSubmission:
    fields = json_object(body.open().read())
    if "pilot" in fields:
        raise UnknownParameter(_NO_PILOT, param="pilot")
    refuse_unknown(fields, _FIELDS)
    return BatchSubmission(
        input_file_id=_text(fields, "input_file_id"),
        endpoint=read_endpoint(_text(fields, "endpoint")),
        completion_window=_text(fields, "completion_window"),
        window_s=read_window_s(fields["completion_window"]),
        metadata=fields.get("metadata"),
        managed=Managed.of(fields),
        output_expires_after_s=_output_expires_after_s(fields.get("output_expires_after")),
        api_key_id=caller.key_id,
        idempotency_key=idempotency_key,
        body_sha256=body.sha256,
        compare_plain=fields.get("compare_plain"),
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise MissingParameter(f"Missing field {name}.", param=name)
    if not isinstance(fields[name], str):
        raise InvalidValue("must be a string", param=name)
    return str(fields[name])


def _output_expires_after_s(expires_after: Any) -> float | None:
    if expires_after is None:
        return None
    if not isinstance(expires_after, dict):
        raise InvalidValue("must be an object with anchor and seconds", param="output_expires_after")
    return read_expires_after_s(expires_after.get("anchor"), expires_after.get("seconds"), "output_expires_after")
