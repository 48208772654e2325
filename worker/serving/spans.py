"""Spans of requests in a worker: when each was claimed, decoded and committed. Nothing is done where nobody traces.

Written when they are over, below the place that their job came with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobs.tracing import record_span, tracing
from storage.records import Claim, RequestProgress
from worker.serving.active_request import ActiveRequest


def claimed(claims: Iterable[Claim], began_at: float, ended_at: float) -> None:
    """Trace the claim of requests whose jobs are traced."""
    if not tracing():
        return
    for claim in claims:
        if claim.traceparent is not None:
            ids = {"job_id": claim.lease.job_id, "request_index": claim.lease.request_index}
            record_span("claim", claim.traceparent, began_at, ended_at, **ids, attempt=claim.attempts)


def committed(entries: Sequence[tuple[ActiveRequest, RequestProgress]], began_at: float, ended_at: float) -> None:
    """Trace the decoding of requests that have ended, and the commit of their outputs, which took this long."""
    if not tracing():
        return
    for request, progress in entries:
        place = request.claim.traceparent
        if place is None or not (progress.ends or progress.failure is not None):
            continue
        ids = {"job_id": progress.lease.job_id, "request_index": progress.lease.request_index}
        tokens = sum(choice.completion_tokens for choice in progress.finished)
        error = None if progress.failure is None else progress.failure.code
        record_span("decode", place, request.taken_at, began_at, **ids, completion_tokens=tokens, error_code=error)
        record_span("output", place, began_at, ended_at, **ids)
