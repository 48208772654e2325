"""How long a job has run and how long it will take, the same in the API and on the page."""

from __future__ import annotations

import time

from storage.queries import JobView


def elapsed_s(job: JobView) -> float:
    """Return the seconds from the start of a job to its end, or to now, without its pauses; 0 before it starts."""
    if job.started_at is None:
        return 0.0
    until = next((at for at in (job.finished_at, job.paused_at) if at is not None), time.time())
    return max(0.0, until - job.started_at - job.paused_s)


def time_left_s(job: JobView) -> float | None:
    """Return the estimated seconds to the end of a running job, None before the first request is computed.

    Only computed requests count for the pace: one that fails, or gets a copy of an answer, can take no time.
    """
    computed = job.requests_completed - job.requests_cached
    if computed <= 0:
        return None
    left = job.requests_total - job.requests_completed - job.requests_failed
    return elapsed_s(job) * left / computed
