"""Trace spans of requests in a worker: claim, decode and output. Without tracing they cost nothing.

A span is recorded when it has ended, below the traceparent of its job.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobs.tracing import record_span, tracing
from storage.records import Claim, RequestProgress
from worker.serving.requests.active_request import ActiveRequest


def record_claims(claims: Iterable[Claim], started_at: float, ended_at: float) -> None:
    """Record a `claim` span for each request whose job is traced."""
    if not tracing():
        return
    for claim in claims:
        if claim.traceparent is not None:
            ids = {"job_id": claim.lease.job_id, "request_index": claim.lease.request_index}
            record_span("claim", claim.traceparent, started_at, ended_at, **ids, attempt=claim.attempts)


def record_commits(
    entries: Sequence[tuple[ActiveRequest, RequestProgress]], started_at: float, ended_at: float
) -> None:
    """Record `decode` and `output` spans of ended requests; the commit lasted from `started_at` to `ended_at`."""
    if not tracing():
        return
    for request, progress in entries:
        traceparent = request.claim.traceparent
        if traceparent is None or not (progress.ends or progress.failure is not None):
            continue
        ids = {"job_id": progress.lease.job_id, "request_index": progress.lease.request_index}
        tokens = sum(choice.completion_tokens for choice in progress.finished)
        error = None if progress.failure is None else progress.failure.code
        attributes = {**ids, "completion_tokens": tokens, "error_code": error}
        record_span("decode", traceparent, request.claimed_at, started_at, **attributes)
        record_span("output", traceparent, started_at, ended_at, **ids)
