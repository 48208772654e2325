"""Build events for jobs that have ended, and for requests that the service failed (timeout, poison), not a worker.

Build them after the commit, from what the storage function returned.
"""

from __future__ import annotations

from collections.abc import Iterable

from jobs.messages import JobStatus, PartialEvent
from storage.records import FailedRequest, RequestFailure


def job_events(ended: Iterable[tuple[str, str]]) -> list[PartialEvent]:
    """Return the events that end the streams of jobs. `ended` has pairs (job id, final status)."""
    return [PartialEvent(job_id=job_id, type="job", status=JobStatus(status)) for job_id, status in ended]


def failure_events(failed: Iterable[FailedRequest]) -> list[PartialEvent]:
    """Return one `failed` event per request."""
    return [
        PartialEvent(
            job_id=request.job_id,
            request=request.custom_id,
            index=request.request_index,
            seq=request.seq,
            type="failed",
            error=error_of(request.failure),
        )
        for request in failed
    ]


def error_of(failure: RequestFailure) -> dict[str, str | None]:
    """Return the `error` field of a `failed` event."""
    return {"code": failure.code, "message": failure.message, "param": failure.param}
