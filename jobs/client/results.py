"""Jobs and outputs as the client returns them: frozen values, parsed from the JSON of the service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, TypeAdapter

from jobs.client.response_format import read_answer
from jobs.errors import AnswerUnreadable, RequestFailed, SetupError
from jobs.messages import JobStatus, Priority, RequestStatus

if TYPE_CHECKING:
    from pandas import DataFrame


class Reply(BaseModel):
    """Part of a reply: frozen, and ignoring fields that only newer servers send."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class JobCounts(Reply):
    """Requests of a job by outcome."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def ended(self) -> int:
        """Requests that completed or failed."""
        return self.completed + self.failed


class JobProgress(Reply):
    """Tokens of a job so far, and its speed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests_cached: int = 0  # of the completed ones: answered by copies of earlier answers
    cached_tokens: int = 0  # prompt and completion tokens of these; no speed counts them
    elapsed_s: float = 0.0
    tokens_per_s: float | None = None
    time_left_s: float | None = None  # estimated from the requests completed so far


class JobInfo(Reply):
    """A job at the time of the call."""

    id: str
    status: JobStatus
    model: str
    endpoint: str
    created_at: int
    expires_at: int | None = None
    request_counts: JobCounts
    progress: JobProgress
    metadata: dict[str, str] | None = None
    budget: JobBudget | None = None
    pause_reason: str | None = None  # user, pilot, budget_tokens or budget_seconds
    name: str | None = None
    labels: dict[str, str] = {}  # the same pairs as metadata
    priority: Priority = Priority.NORMAL
    max_concurrent: int | None = None  # of its requests that run at once
    paused_at: int | None = None
    retry_of: str | None = None  # the job whose requests without a result this job runs
    prompts_deleted_at: int | None = None  # because of their age
    outputs_deleted_at: int | None = None
    sampling_defaults: dict[str, Any] | None = None  # that the model's generation config gave to its first request


class CheckCounts(Reply):
    """Requests of a submission that was only checked."""

    total: int
    accepted: int
    refused: int


class RefusedRequest(Reply):
    """A request that would be refused: its place, the field and the reason."""

    index: int
    line: int | None = None  # 1-based, of a file of lines; None: the requests came as a list
    custom_id: str
    code: str
    param: str | None = None
    message: str


class JobCheck(Reply):
    """What a submission would become. Nothing was stored."""

    model: str
    endpoint: str
    context_tokens: int | None = None  # of the workers that serve the model; None: no worker has reported it
    request_counts: CheckCounts
    prompt_tokens: int  # of the accepted requests
    prompt_tokens_source: Literal["bytes", "tokenizer"]  # bytes: an estimate, a token for each four
    max_output_tokens: int  # at most, over all texts
    requests_without_max_tokens: int = 0  # only the context bounds these
    refused: tuple[RefusedRequest, ...] = ()  # the first hundred
    limit: str | None = None  # the limit of the key or the queue that refuses the job now

    @property
    def passes(self) -> bool:
        """True if nothing would be refused."""
        return not self.request_counts.refused and self.limit is None


class JobBudget(Reply):
    """What a job may spend before it pauses."""

    tokens: int | None = None  # of its prompts and completions
    seconds: float | None = None  # since its start, without pauses


class Prediction(Reply):
    """A predicted number, and the range that holds the truth with a probability of 90 %."""

    estimate: float
    low: float
    high: float


class PilotResult(Reply):
    """The requests of a job that ran first."""

    requests: int
    completed: int
    prompt_tokens: int
    completion_tokens: int


class RestPrediction(Reply):
    """What the other requests of a job will take. None: it can't be predicted."""

    requests: int
    requests_cached: int = 0  # of these: they get copies of answers, so that nothing below counts them
    prompt_tokens: Prediction
    completion_tokens: Prediction
    seconds: Prediction | None = None
    joules: Prediction | None = None


class JobEstimate(Reply):
    """The prediction of a job from its pilot."""

    job_id: str
    pilot: PilotResult
    rest: RestPrediction
    workers: int  # that serve the model
    batch_sequences: int  # texts of the job that a worker decodes at once
    power_w: float | None = None  # of a worker
    power_source: str | None = None  # measured or configured


class VerificationCounts(Reply):
    """Verified requests by result."""

    equal: int
    different: int
    not_comparable: int


class Verification(Reply):
    """A sample of a job that the service computes again. `counts` are there when it has ended."""

    id: str
    job_id: str
    status: JobStatus
    sample: str
    request_counts: JobCounts
    counts: VerificationCounts | None = None


class ErrorDetails(Reply):
    """Why a request has no output text."""

    message: str
    code: str | None = None
    param: str | None = None


class CalledFunction(Reply):
    """The function that a call names, and its arguments: a JSON object, as text."""

    name: str
    arguments: str


class ChoiceCall(Reply):
    """A tool call that the model wrote."""

    id: str
    function: CalledFunction


class Choice(Reply):
    """One generated text of a request."""

    index: int
    text: str  # as the model wrote it
    content: str | None = None  # without reasoning and calls; sent if the text may have them
    reasoning_content: str | None = None  # None: no reasoning
    tool_calls: tuple[ChoiceCall, ...] = ()
    finish_reason: str
    completion_tokens: int
    numerics: str | None = None  # what fixed the bits of the text; None: an older version computed it
    cached_from: str | None = None  # the answer that it is a copy of: job id/index of the request
    logprobs: dict[str, Any] | None = None  # in OpenAI's format, if requested
    token_ids: tuple[int, ...] | None = None  # if requested, as are the next two
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[dict[str, Any] | None, ...] | None = None  # in vLLM's format
    _adapter: TypeAdapter[Any] | None = PrivateAttr(None)

    @property
    def parsed(self) -> Any:
        """The value of the answer: of the type that the job was submitted or opened with, else as JSON values.

        Raises AnswerUnreadable, for instance if the text was cut.
        """
        return read_answer(self.answer, self.finish_reason, self._adapter)

    @property
    def answer(self) -> str:
        """The text without reasoning and calls; empty if the model wrote nothing else."""
        return self.content or "" if "content" in self.model_fields_set else self.text


class Output(Reply):
    """The output of one request: its choices, or the error."""

    custom_id: str
    index: int
    status: RequestStatus
    keep: dict[str, Any] | None = None  # values that the request carried
    prompt: str | list[Any] | None = None  # if asked for: the text, or the messages
    choices: tuple[Choice, ...] = ()
    error: ErrorDetails | None = None
    sampling_defaults: dict[str, Any] | None = None  # sampling parameters that the model's generation config gave
    cursor: str | None = None  # with `follow`: the position after this output

    @property
    def text(self) -> str:
        """The text of the first choice; empty if the request failed."""
        return self.choices[0].text if self.choices else ""

    @property
    def answer(self) -> str:
        """The text of the first choice without reasoning and calls; empty if there is none."""
        return self.choices[0].answer if self.choices else ""

    @property
    def parsed(self) -> Any:
        """The value of the first choice, as `Choice.parsed`. Raises RequestFailed if the request failed."""
        if self.choices:
            return self.choices[0].parsed
        error = self.error or ErrorDetails(message=f"The request is {self.status}.")
        raise RequestFailed(error.message, code=error.code, param=error.param)

    def read_by(self, adapter: TypeAdapter[Any] | None) -> Output:
        """Let `parsed` return values of the adapter's type, and return the output."""
        for choice in self.choices:
            choice._adapter = adapter
        return self


OUTPUT_COLUMNS = (
    *("custom_id", "index", "status", "choice", "text", "finish_reason", "completion_tokens", "error"),
    *("content", "reasoning_content", "tool_calls", "numerics"),
)
_TAKEN = frozenset({*OUTPUT_COLUMNS, "parsed", "prompt"})
Statistics = dict[str, Any]  # what `/v1/stats` returns; field names as in the SQL views


def output_rows(output: Output, parsed: bool = False) -> Iterator[dict[str, Any]]:
    """Yield an output as flat rows: one per choice, or a single row with the error.

    With `parsed`, a row has the value of its text too: None if the request failed, or the text can't be read. Kept
    values have columns of their own, named input_… where an output has a column of that name. Prompts are in the column
    prompt, if they were asked for.
    """
    request = {"custom_id": output.custom_id, "index": output.index, "status": output.status.value}
    carried = {f"input_{name}" if name in _TAKEN else name: value for name, value in (output.keep or {}).items()}
    carried |= {} if output.prompt is None else {"prompt": output.prompt}
    error = None if output.error is None else output.error.message
    if not output.choices:
        row = {**dict.fromkeys(OUTPUT_COLUMNS), **request, "choice": 0, "completion_tokens": 0, "error": error}
        yield row | ({"parsed": None} if parsed else {}) | carried
    for choice in output.choices:
        yield {
            **request,
            "choice": choice.index,
            "text": choice.text,
            "finish_reason": choice.finish_reason,
            "completion_tokens": choice.completion_tokens,
            "error": error,
            "content": choice.answer,
            "reasoning_content": choice.reasoning_content,
            "tool_calls": _calls_json(choice.tool_calls),
            "numerics": choice.numerics,
            **({"parsed": _value_or_none(choice)} if parsed else {}),
            **carried,
        }


def _value_or_none(choice: Choice) -> Any:
    try:
        return choice.parsed
    except AnswerUnreadable:
        return None


def _calls_json(calls: tuple[ChoiceCall, ...]) -> str | None:
    """Return calls as JSON text; None without any."""
    return json.dumps([call.model_dump() for call in calls], ensure_ascii=False) if calls else None


def to_dataframe(rows: list[dict[str, Any]]) -> DataFrame:
    """Return output rows as a pandas DataFrame."""
    try:
        import pandas
    except ModuleNotFoundError as exc:
        raise SetupError("DataFrames need pandas; install it with: pip install 'basic-batch[pandas]'") from exc
    columns = dict.fromkeys((*OUTPUT_COLUMNS, *(name for row in rows for name in row)))
    return pandas.DataFrame(rows, columns=list(columns))
