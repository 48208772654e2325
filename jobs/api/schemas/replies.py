"""Response models of the routes, for the OpenAPI document and generated clients.

`serializers` builds the bodies without these models, for speed; a test checks that both agree. Fields that have no
value yet are null, not missing.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from jobs.messages import Endpoint, JobStatus, Priority
from storage.queries import WorkerView
from storage.statistics import JobSummary

Json = dict[str, Any]

_FILE: Final[Json] = {
    "id": "file-0279686e3beef124974af6614f487747",
    "object": "file",
    "bytes": 437,
    "created_at": 1795572489,
    "expires_at": 1798164489,
    "filename": "batch.jsonl",
    "purpose": "batch",
    "status": "processed",
    "status_details": None,
}
_BATCH: Final[Json] = {
    "id": "batch_442ad11c58dfc0dbc6a6fdf44fa34172",
    "object": "batch",
    "status": "completed",
    "model": "smollm2-135m-instruct",
    "endpoint": "/v1/chat/completions",
    "input_file_id": _FILE["id"],
    "output_file_id": "file-387c5165827d5c75f2f86833c022a1bd",
    "error_file_id": None,
    "errors": None,
    "completion_window": "24h",
    "created_at": 1795576167,
    "in_progress_at": 1795576168,
    "expires_at": 1795662567,
    "finalizing_at": 1795576201,
    "cancelling_at": None,
    "completed_at": 1795576201,
    "failed_at": None,
    "expired_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 20, "completed": 20, "failed": 0},
    "usage": {
        "input_tokens": 690,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 80,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 770,
    },
    "metadata": {"team": "search"},
}
_ERROR: Final[Json] = {
    "error": {"message": "Why the request is invalid.", "type": "invalid_request_error", "param": "id", "code": None}
}


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorInfo(_Reply):
    """An error: its message, type and code, and the field that caused it, if one did."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(_Reply):
    """The body of every error."""

    model_config = ConfigDict(json_schema_extra={"example": _ERROR})

    error: ErrorInfo


class BatchError(_Reply):
    """An error in the input of a batch, with its line."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(_Reply):
    """The errors for which a batch failed, with their lines."""

    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(_Reply):
    """Requests of a job. The rest of `total` is queued, running, expired or cancelled."""

    total: int
    completed: int
    failed: int


class Progress(_Reply):
    """Tokens, speed and remaining time of a job."""

    prompt_tokens: int
    completion_tokens: int
    requests_cached: int  # of the completed ones: answered by copies of earlier answers
    cached_tokens: int  # prompt and completion tokens of these; no speed counts them
    elapsed_s: float
    tokens_per_s: float | None
    time_left_s: float | None


class BudgetReply(_Reply):
    """What a job may spend before it pauses."""

    tokens: int | None  # of its prompts and completions
    seconds: float | None  # since its start, without pauses


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
    name: str | None
    labels: dict[str, str]  # the same pairs as metadata
    priority: Priority
    max_concurrent: int | None  # of its requests that run at once
    budget: BudgetReply | None
    paused_at: int | None
    pause_reason: str | None  # user, pilot, budget_tokens or budget_seconds
    retry_of: str | None
    prompts_deleted_at: int | None  # because of their age
    outputs_deleted_at: int | None
    verification_of: str | None = None  # of a verification: the job whose sample it computes again
    # Sampling parameters that the model's generation config gave to its first request; of a single job only.
    sampling_defaults: Json | None = None


class CheckCountsReply(_Reply):
    """Requests of a submission that was only checked."""

    total: int
    accepted: int
    refused: int


class RefusedRequestReply(_Reply):
    """A request that would be refused: its place, the field and the reason."""

    index: int
    line: int | None
    custom_id: str
    code: str
    param: str | None
    message: str


class JobCheckReply(_Reply):
    """What a submission would become; nothing is stored."""

    object: Literal["job.check"]
    model: str
    endpoint: Endpoint
    context_tokens: int | None
    request_counts: CheckCountsReply
    prompt_tokens: int
    prompt_tokens_source: Literal["bytes"]
    max_output_tokens: int
    requests_without_max_tokens: int
    refused: list[RefusedRequestReply]
    limit: str | None


class IntervalReply(_Reply):
    """A prediction, and the range that holds the truth with a probability of 90 %."""

    estimate: float
    low: float
    high: float


class PilotReply(_Reply):
    """The requests of a job that ran first."""

    requests: int
    completed: int
    prompt_tokens: int
    completion_tokens: int


class RestReply(_Reply):
    """What the other requests of a job will take. Null: it can't be predicted."""

    requests: int
    requests_cached: int  # of these: they get copies of answers, so that nothing below counts them
    prompt_tokens: IntervalReply
    completion_tokens: IntervalReply
    seconds: IntervalReply | None
    joules: IntervalReply | None


class JobEstimateReply(_Reply):
    """The prediction of a job from its pilot."""

    object: Literal["job.estimate"]
    job_id: str
    pilot: PilotReply
    rest: RestReply
    workers: int
    batch_sequences: int  # texts of the job that a worker decodes at once
    power_w: float | None  # of a worker
    power_source: Literal["measured", "configured"] | None


class JobPage(_Reply):
    """A page of the list of jobs, in the requested order."""

    object: Literal["list"]
    data: list[JobReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class CallFunction(_Reply):
    """The function that a call names, and its arguments: a JSON object, as text."""

    name: str
    arguments: str


class MessageCall(_Reply):
    """A call of a function that the model wrote."""

    id: str
    type: Literal["function"]
    function: CallFunction


class OutputChoice(_Reply):
    """One of the texts generated for a request."""

    index: int
    text: str  # as the model wrote it
    content: str | None = None  # without reasoning and calls, if the text may have them
    reasoning_content: str | None = None
    reasoning: str | None = None  # same as reasoning_content
    tool_calls: list[MessageCall] | None = None  # if the model called functions
    finish_reason: str
    completion_tokens: int
    # What fixed the bits of the text (/v1/numerics); two with a comma between them: it was resumed on another kind of
    # device or by another version.
    numerics: str | None = None
    cached_from: str | None = None  # the answer that it is a copy of: job id/index of the request
    logprobs: Json | None = None  # if requested, as are the next three
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Json | None] | None = None


class CompletionDetails(_Reply):
    """Completion tokens by their part of the answer."""

    reasoning_tokens: int  # markers included


class OutputUsage(_Reply):
    """Tokens of a request. The prompt counts once for all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails | None = None  # if the model marks its reasoning
    cached_answer_tokens: int | None = None  # prompt and completion tokens of an answer that is a copy


class OutputLine(_Reply):
    """A line of a job's outputs: a request that has ended, with its choices or its error."""

    custom_id: str
    index: int
    status: Literal["completed", "failed", "expired", "cancelled"]
    keep: Json | None = None  # the values that the request carries
    prompt: str | list[Any] | None = None  # with `prompt`: the text, or the messages
    choices: list[OutputChoice] | None = None
    usage: OutputUsage | None = None
    sampling_defaults: Json | None = None  # sampling parameters that the model's generation config gave
    error: ErrorInfo | None = None
    cursor: str | None = None  # with `follow`: resume after this line


class FileReply(_Reply):
    """An uploaded file, or an output or error file of a batch."""

    model_config = ConfigDict(json_schema_extra={"example": _FILE})

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
    """A page of the list of files, in the requested order."""

    object: Literal["list"]
    data: list[FileReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(_Reply):
    """Confirmation that a file was deleted."""

    model_config = ConfigDict(json_schema_extra={"example": {"id": _FILE["id"], "object": "file", "deleted": True}})

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class JobDeleted(_Reply):
    """Confirmation that a job is hidden and erased."""

    id: str
    object: Literal["job"]
    deleted: Literal[True]


class ResponseDeleted(_Reply):
    """Confirmation that a response is hidden and erased."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputDetails(_Reply):
    """Details of the input tokens. Cached tokens are not counted: always 0."""

    cached_tokens: int


class OutputDetails(_Reply):
    """Details of the output tokens. Reasoning tokens are not counted: always 0."""

    reasoning_tokens: int


class BatchUsage(_Reply):
    """Token counts of a batch, summed over its completed requests."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled"
]


class BatchReply(_Reply):
    """A job created from a file. Times are Unix seconds."""

    model_config = ConfigDict(json_schema_extra={"example": _BATCH})

    id: str
    object: Literal["batch"]
    status: BatchStatus
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
    """A page of the list of batches, in the requested order."""

    object: Literal["list"]
    data: list[BatchReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AnswerMessage(_Reply):
    """The message that the model wrote."""

    role: Literal["assistant"]
    content: str | None  # null: the model wrote nothing but reasoning or calls
    reasoning_content: str | None = None  # if the model marks its reasoning
    reasoning: str | None = None  # same as reasoning_content
    tool_calls: list[MessageCall] | None = None  # if the model called functions
    refusal: str | None


class ChatChoice(_Reply):
    """One of the `n` answers to a chat."""

    index: int
    message: AnswerMessage
    logprobs: Json | None
    finish_reason: str
    token_ids: list[int] | None = None  # if requested


class ChatReply(_Reply):
    """The response to a chat: `n` answers and the token counts."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str | None
    usage: OutputUsage
    prompt_token_ids: list[int] | None = None  # if requested, as is the next
    prompt_logprobs: list[Json | None] | None = None


class TextChoice(_Reply):
    """One of the `n` completions of a prompt."""

    index: int
    text: str
    logprobs: Json | None
    finish_reason: str
    token_ids: list[int] | None = None  # if requested, as are the next two
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Json | None] | None = None


class TextReply(_Reply):
    """The response to a prompt: its completions and the token counts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str | None
    usage: OutputUsage


class DeltaFunction(_Reply):
    """The name of a function, once, and pieces of its arguments."""

    name: str | None = None
    arguments: str


class DeltaCall(_Reply):
    """The part of a call that a chunk adds: id, type and name first, then its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction


class ChatDelta(_Reply):
    """The part of a message that a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # same as reasoning_content
    tool_calls: list[DeltaCall] | None = None


class ChatChunkChoice(_Reply):
    """What a chunk adds to one answer of a chat."""

    index: int
    delta: ChatDelta
    logprobs: Json | None
    finish_reason: str | None
    token_ids: list[int] | None = None  # after the text, if requested


class ChatChunk(_Reply):
    """A streamed part of the answer to a chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str | None
    prompt_token_ids: list[int] | None = None  # after the text, if requested, as is the next
    prompt_logprobs: list[Json | None] | None = None
    usage: OutputUsage | None = None  # if requested


class TextChunkChoice(_Reply):
    """What a chunk adds to one completion."""

    index: int
    text: str
    logprobs: Json | None
    finish_reason: str | None
    token_ids: list[int] | None = None  # after the text, if requested, as are the next two
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Json | None] | None = None


class TextChunk(_Reply):
    """A streamed part of the answer to a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    system_fingerprint: str | None
    usage: OutputUsage | None = None  # if requested


class ModelReply(_Reply):
    """A model that live workers serve, or the target of this installation."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_tokens: int | None


class ModelList(_Reply):
    """The models that jobs may use."""

    object: Literal["list"]
    data: list[ModelReply]


class WorkerList(_Reply):
    """All registered workers, stopped ones included."""

    object: Literal["list"]
    data: list[WorkerView]


class Verdicts(_Reply):
    """Sampled requests by result."""

    equal: int
    different: int
    not_comparable: int


class VerificationReply(_Reply):
    """A sample of a job that is computed again. Times are Unix seconds."""

    id: str
    object: Literal["verification"]
    job_id: str
    status: JobStatus
    sample: str  # as asked for
    seed: str  # of the random sample
    created_at: int
    finished_at: int | None
    request_counts: RequestCounts
    counts: Verdicts | None  # null until it has ended


class VerifiedJob(_Reply):
    """The job that was verified."""

    id: str
    model: str
    endpoint: Endpoint
    created_at: int
    requests_total: int
    requests_completed: int


class VerifiedOutput(_Reply):
    """A sampled request: what fixed the bits of both computations, hashes of both, and the result."""

    index: int
    custom_id: str
    result: Literal["equal", "different", "not_comparable"]
    reason: str | None  # where it differs, or why it can't be compared
    numerics: list[str]
    recomputed_numerics: list[str]
    sha256: str | None  # of [text, token ids, finish reason] of each choice, as JSON
    recomputed_sha256: str | None


class ReportSignature(_Reply):
    """A signature over all other fields: JSON in UTF-8 with sorted keys and without white space."""

    algorithm: Literal["Ed25519"]
    public_key: str  # base64, as is the next
    value: str


class VerificationReport(_Reply):
    """The signed report of an ended verification."""

    id: str
    object: Literal["verification_report"]
    version: Literal[1]
    service: str
    job_id: str
    job: VerifiedJob
    status: JobStatus
    sample: str
    seed: str
    drafts: Literal[False]
    created_at: int
    finished_at: int | None
    request_counts: RequestCounts
    counts: Verdicts
    numerics: dict[str, Json]  # parts of each fingerprint
    requests: list[VerifiedOutput]
    signature: ReportSignature


class SigningKeyReply(_Reply):
    """The public key that signs reports."""

    object: Literal["signing_key"]
    algorithm: Literal["Ed25519"]
    public_key: str  # base64


class NumericsReply(_Reply):
    """What a fingerprint in outputs stands for: everything that fixes the bits of a text."""

    fingerprint: str
    object: Literal["numerics"]
    parts: Json  # weights, dtype, device kind, kernels, libraries and others, by name


class JobRowList(_Reply):
    """The newest jobs, with their statistics."""

    object: Literal["list"]
    data: list[JobSummary]


class HealthReply(_Reply):
    """The process is alive."""

    status: Literal["ok"]


class ReadyReply(_Reply):
    """The service accepts jobs."""

    status: Literal["ready"]
    database: Literal["ok"]
    redis: Literal["ok", "degraded"]
    models: list[str]
