"""What the routes answer with, as types: for the OpenAPI document, and for whoever generates a client from it.

The bodies are made in `views`; a test holds the two together, so nothing is checked here while calls wait. What has not
come yet is null, and is there.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from jobs.messages import Endpoint, JobStatus, PartialEvent
from storage.queries import JobStats, WorkerView
from storage.statistics import JobSummary

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


class FileReply(_Reply):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: str | None


class FilePage(_Reply):
    """A page of the list of files."""

    object: Literal["list"]
    data: list[FileReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(_Reply):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class InputDetails(_Reply):
    """Of the tokens that were read. Nothing is cached between requests."""

    cached_tokens: int


class OutputDetails(_Reply):
    """Of the tokens that were written. Nothing is thought unseen."""

    reasoning_tokens: int


class BatchUsage(_Reply):
    """Tokens of a batch."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class BatchReply(_Reply):
    """A job that is made of a file. Times are Unix seconds."""

    id: str
    object: Literal["batch"]
    status: JobStatus
    model: str | None
    endpoint: Endpoint
    input_file_id: str
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
    usage: BatchUsage | None
    metadata: dict[str, str] | None


class BatchPage(_Reply):
    """A page of the list of batches, newest first."""

    object: Literal["list"]
    data: list[BatchReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AnswerMessage(_Reply):
    """What the model says in a chat."""

    role: Literal["assistant"]
    content: str
    refusal: str | None


class ChatChoice(_Reply):
    """One answer of a chat."""

    index: int
    message: AnswerMessage
    logprobs: Json | None
    finish_reason: str


class ChatReply(_Reply):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str | None
    usage: OutputUsage


class TextChoice(_Reply):
    """One text."""

    index: int
    text: str
    logprobs: Json | None
    finish_reason: str


class TextReply(_Reply):
    """The answer to a plain text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str | None
    usage: OutputUsage


class ChatDelta(_Reply):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Reply):
    """What is new of one answer of a chat."""

    index: int
    delta: ChatDelta
    logprobs: Json | None
    finish_reason: str | None


class ChatChunk(_Reply):
    """A piece of the answer to a chat, as it is written."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str | None
    usage: OutputUsage | None = None  # if it was asked for


class TextChunkChoice(_Reply):
    """What is new of one text."""

    index: int
    text: str
    logprobs: Json | None
    finish_reason: str | None


class TextChunk(_Reply):
    """A piece of the answer to a plain text, as it is written."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    system_fingerprint: str | None
    usage: OutputUsage | None = None  # if it was asked for


class ModelReply(_Reply):
    """A model that a job may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_tokens: int | None


class ModelList(_Reply):
    """The models that a job may name."""

    object: Literal["list"]
    data: list[ModelReply]


class WorkerList(_Reply):
    """The workers that have introduced themselves."""

    object: Literal["list"]
    data: list[WorkerView]


class JobRowList(_Reply):
    """The newest jobs, each with its numbers."""

    object: Literal["list"]
    data: list[JobSummary]


class HealthReply(_Reply):
    """The process is alive."""

    status: Literal["ok"]


class ReadyReply(_Reply):
    """Jobs can be taken."""

    status: Literal["ready"]
    database: Literal["ok"]
    redis: Literal["ok", "degraded"]
    models: list[str]


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


def _answered(whole: type[BaseModel], piece: type[BaseModel]) -> dict[int | str, Json]:
    """Return the entry of a route whose answer comes whole, or in pieces as server-sent events."""
    content = {
        "text/event-stream": {
            "schema": {"type": "string"},
            "x-event": {"$ref": _REFERENCE.format(model=piece.__name__)},
        }
    }
    return {200: {"model": whole, "description": "The answer; with `stream` in pieces.", "content": content}}


CHAT: Final = _answered(ChatReply, ChatChunk)
TEXT: Final = _answered(TextReply, TextChunk)
MODEL: Final = _replied(ModelReply, "The model.")
MODELS: Final = _replied(ModelList, "The models.")
WORKERS: Final = _replied(WorkerList, "The workers.")
JOB_ROWS: Final = _replied(JobRowList, "The jobs.")
HEALTH: Final = _replied(HealthReply, "The process is alive.")
READY: Final = _replied(ReadyReply, "Jobs can be taken.")


def streamed_schemas() -> Json:
    """Return the schemas that only bodies of many values refer to."""
    _, found = models_json_schema(
        [(model, "serialization") for model in (OutputLine, PartialEvent, ChatChunk, TextChunk)],
        ref_template=_REFERENCE,
    )
    return dict(found["$defs"])
