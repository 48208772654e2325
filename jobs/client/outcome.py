"""The status of a job in words: "completed" alone would hide that requests failed. In JSON it stays OpenAI's word."""

from __future__ import annotations

import re
from typing import Final

from jobs.client.results import ErrorDetails, JobInfo
from jobs.messages import JobStatus

_POSITION: Final = re.compile(r"^(?:line \d+|requests\[\d+\])[^:]*: ")


def status_text(status: str, completed: int, failed: int) -> str:
    """Return a status in words; `completed` and `failed` are the job's numbers of requests with these ends."""
    if status != JobStatus.COMPLETED or not failed:
        return status.replace("_", " ")
    return f"completed, {failed:,d} failed" if completed else "completed, all failed"


def job_status_text(info: JobInfo) -> str:
    """Return the status of a job in words, with the number of failed requests if it completed with any."""
    return status_text(info.status, info.request_counts.completed, info.request_counts.failed)


def error_text(error: ErrorDetails) -> str:
    """Return the field and the message of an error, without the request's position in its job."""
    rule = _POSITION.sub("", error.message)
    return f"{error.param}: {rule}" if error.param else rule


def completed_with_failures(status: str, failed: int) -> bool:
    """Return whether a job completed although requests of it failed."""
    return status == JobStatus.COMPLETED and failed > 0
