"""Routes of verifications: compute a sample of a job again, and report what is equal."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from jobs.api.auth.caller import CurrentCaller
from jobs.api.dependencies import CurrentServices, ExistingJob, find_job
from jobs.api.http.body import Body
from jobs.api.schemas.openapi import ERRORS, VERIFICATION_BODY
from jobs.api.schemas.route_responses import SIGNING_KEY, VERIFICATION, VERIFICATION_REPORT
from jobs.api.submissions import json_object
from jobs.api.write_threads import run_write
from jobs.errors import NotFound, NotVerifiable, UnknownParameter
from jobs.messages import JobStatus
from jobs.verification.report import verification_report, verification_state
from jobs.verification.sample import DEFAULT_SAMPLE, start_verification
from jobs.verification.signature import ALGORITHM, public_key_of, signed
from storage.queries import JobView

router = APIRouter(tags=["verifications"], responses=ERRORS)

_MAX_BODY_BYTES = 10_000


@router.post(
    "/v1/jobs/{job_id}/verifications", response_model=None, openapi_extra=VERIFICATION_BODY, responses=VERIFICATION
)
async def verify(
    request: Request,
    job: ExistingJob,
    services: CurrentServices,
    caller: CurrentCaller,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Compute a sample of the job's completed requests again, without drafts. Body: `{"sample": "1%"}` or a number.

    The verification is a job of the same owner, which is in no list; cancel it as a job.
    """

    def accept(body: Body) -> Response:
        fields = json_object(body.open().read()) if body.size else {}
        unknown = next((name for name in fields if name != "sample"), None)
        if unknown is not None:
            raise UnknownParameter("The field is unknown; a verification has the field sample.", param=unknown)
        verification_id = start_verification(
            job,
            fields.get("sample", DEFAULT_SAMPLE),
            idempotency_key=idempotency_key,
            database=services.database,
            notify=services.notify,
            settings=services.settings,
        )
        return JSONResponse(verification_state(find_job(services, verification_id, caller), services.database))

    async with services.bodies.received(request, _MAX_BODY_BYTES) as body:
        return await run_write(accept, body)


def find_verification(verification_id: str, services: CurrentServices, caller: CurrentCaller) -> JobView:
    """Return a verification; raise NotFound for the id of anything else."""
    found = find_job(services, verification_id, caller)
    if found.verification_of is None:
        raise NotFound(f"There is no verification {verification_id[:80]!r}.", param="id")
    return found


Existing = Annotated[JobView, Depends(find_verification)]


@router.get("/v1/verifications/signing-key", response_model=None, responses=SIGNING_KEY)
async def signing_key(services: CurrentServices) -> Response:
    """Read the public key of this installation, which signs reports."""
    key = await run_in_threadpool(public_key_of, services.settings.resolved_signing_key)
    return JSONResponse({"object": "signing_key", "algorithm": ALGORITHM, "public_key": key})


@router.get("/v1/verifications/{verification_id}", response_model=None, responses=VERIFICATION)
def retrieve(found: Existing, services: CurrentServices) -> Response:
    """Read a verification. `counts` are set when it has ended."""
    return JSONResponse(verification_state(found, services.database))


@router.get("/v1/verifications/{verification_id}/report", response_model=None, responses=VERIFICATION_REPORT)
def report(found: Existing, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Read the signed report of an ended verification: each request, its result, numerics and hashes."""
    if not JobStatus(found.status).final:
        raise NotVerifiable(f"The verification is {found.status}; its report exists when it has ended.")
    verified = find_job(services, str(found.verification_of), caller)
    content = verification_report(found, verified, services.database)
    return JSONResponse(signed(content, services.settings.resolved_signing_key))
