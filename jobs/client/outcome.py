"""The status of a job in words for people: `completed` alone says too much where requests failed.

Pure. On the wire the status stays the bare word, as OpenAI has it.
"""

from __future__ import annotations

import re
from typing import Final

from jobs.client.results import ErrorInfo, JobInfo
from jobs.messages import JobStatus

_PLACE: Final = re.compile(r"^(?:line \d+|requests\[\d+\])[^:]*: ")


def status_words(status: str, completed: int, failed: int) -> str:
    """Return the status of a job with so many requests completed and failed."""
    if status != JobStatus.COMPLETED or not failed:
        return status.replace("_", " ")
    return f"completed, {failed:,d} failed" if completed else "completed, all failed"


def info_words(info: JobInfo) -> str:
    """Return the status of a job as the client reads it."""
    return status_words(info.status, info.request_counts.completed, info.request_counts.failed)


def error_words(error: ErrorInfo) -> str:
    """Return what a request did wrong: the field and the message, without where the request stands in its job."""
    rule = _PLACE.sub("", error.message)
    return f"{error.param}: {rule}" if error.param else rule


def warns(status: str, failed: int) -> bool:
    """Return whether a job has ended well by its status, and not for all its requests."""
    return status == JobStatus.COMPLETED and failed > 0
