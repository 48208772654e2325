"""What the routes of jobs answer with, as types: for the OpenAPI document, and for whoever generates a client from it.

jobs, document -> [replies].  The bodies are made in `views`; a test holds the two together, so nothing is checked here
while calls wait. What has not come yet is null, and is there.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from jobs.messages import Endpoint, JobStatus, PartialEvent
from storage.queries import JobStats

Json = dict[str, Any]

_REFERENCE: Final = "#/components/schemas/{model}"


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorInfo(_Reply):
    """What went wrong: the field it is about and a code for programs, where there are such."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(_Reply):
    """The body of every error."""

    error: ErrorInfo


class BatchError(_Reply):
    """What is wrong with the input of a batch, and in which line."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(_Reply):
    """Why the input of a batch as a whole is bad."""

    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(_Reply):
    """Requests of a job. What is in none of the last two waits, runs, or has expired or been cancelled."""

    total: int
    completed: int
    failed: int


class Progress(_Reply):
    """How far a job is, and how fast."""

    prompt_tokens: int
    completion_tokens: int
    elapsed_s: float
    tokens_per_s: float | None
    time_left_s: float | None


class JobReply(_Reply):
    """A job. Times are Unix seconds."""

    id: str
    object: Literal["job"]
    status: JobStatus
    model: str
    endpoint: Endpoint
    input_file_id: str | None
    output_file_id: str | None
    error_file_id: str | None
    errors: BatchErrors | None
    completion_window: str
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    cancelling_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    progress: Progress
    metadata: dict[str, str] | None
    retry_of: str | None


class JobPage(_Reply):
    """A page of the list of jobs, newest first."""

    object: Literal["list"]
    data: list[JobReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class OutputChoice(_Reply):
    """One text of a request."""

    index: int
    text: str
    finish_reason: str
    completion_tokens: int
    logprobs: Json | None = None  # if they were asked for


class OutputUsage(_Reply):
    """Tokens of a request. A prompt counts once, whatever the number of choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class OutputLine(_Reply):
    """A line of a job's outputs: a request that has ended, with its choices, or with the reason why there are none."""

    custom_id: str
    index: int
    status: Literal["completed", "failed", "expired", "cancelled"]
    choices: list[OutputChoice] | None = None
    usage: OutputUsage | None = None
    error: ErrorInfo | None = None
    cursor: str | None = None  # with `follow`: where a new call goes on


def _replied(model: type, description: str) -> dict[int | str, Json]:
    """Return the entry of a route that answers with a model."""
    return {200: {"model": model, "description": description}}


def _streamed(content_type: str, part: str, model: type[BaseModel], description: str) -> dict[int | str, Json]:
    """Return the entry of a route whose body is many values; `part` names their type, for OpenAPI 3.1 can't."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {
        200: {"content": {content_type: {"schema": {"type": "string"}, part: reference}}, "description": description}
    }


JOB: Final = _replied(JobReply, "The job.")
JOBS: Final = _replied(JobPage, "A page of the list.")
STATISTICS: Final = _replied(JobStats, "The numbers.")
LINES: Final = _streamed("application/x-ndjson", "x-line", OutputLine, "JSON lines, one request each.")
EVENTS: Final = _streamed("text/event-stream", "x-event", PartialEvent, "Server-sent events; the data of each is JSON.")


def streamed_schemas() -> Json:
    """Return the schemas that only bodies of many values refer to."""
    _, found = models_json_schema(
        [(OutputLine, "serialization"), (PartialEvent, "serialization")], ref_template=_REFERENCE
    )
    return dict(found["$defs"])
