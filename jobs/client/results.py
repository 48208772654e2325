"""What the service says about jobs, as frozen values for the client. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from jobs.errors import SetupError
from jobs.messages import JobStatus, RequestStatus

if TYPE_CHECKING:
    from pandas import DataFrame


class Reply(BaseModel):
    """Part of a reply: does not change, and ignores fields of newer servers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RequestCounts(Reply):
    """Requests of a job by outcome."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def ended(self) -> int:
        """Requests that have an answer."""
        return self.completed + self.failed


class Progress(Reply):
    """How much of a job is written, and how fast."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    elapsed_s: float = 0.0
    tokens_per_s: float | None = None
    time_left_s: float | None = None  # at the pace so far


class JobInfo(Reply):
    """A job as it was when it was read."""

    id: str
    status: JobStatus
    model: str
    endpoint: str
    created_at: int
    expires_at: int | None = None
    request_counts: RequestCounts
    progress: Progress
    metadata: dict[str, str] | None = None
    retry_of: str | None = None  # the job whose failed requests it runs again


class ErrorInfo(Reply):
    """Why a request has no text."""

    message: str
    code: str | None = None
    param: str | None = None


class Choice(Reply):
    """One text written for a request."""

    index: int
    text: str
    finish_reason: str
    completion_tokens: int
    logprobs: dict[str, Any] | None = None  # as OpenAI shapes them, if they were asked for


class Output(Reply):
    """The answer to one request: its choices, or the reason why there are none."""

    custom_id: str
    index: int
    status: RequestStatus
    choices: tuple[Choice, ...] = ()
    error: ErrorInfo | None = None
    cursor: str | None = None  # of an answer that was followed: where to go on

    @property
    def text(self) -> str:
        """The text of the first choice; empty for a request that failed."""
        return self.choices[0].text if self.choices else ""


Statistics = dict[str, Any]  # the numbers of `/stats`, by the names of the SQL views


def rows(output: Output) -> Iterator[dict[str, Any]]:
    """Yield an answer as flat rows: one a choice, or a single one with the error."""
    request = {"custom_id": output.custom_id, "index": output.index, "status": output.status.value}
    error = None if output.error is None else output.error.message
    if not output.choices:
        yield {**request, "choice": 0, "text": None, "finish_reason": None, "completion_tokens": 0, "error": error}
    for choice in output.choices:
        yield {
            **request,
            "choice": choice.index,
            "text": choice.text,
            "finish_reason": choice.finish_reason,
            "completion_tokens": choice.completion_tokens,
            "error": error,
        }


def frame(table: list[dict[str, Any]]) -> DataFrame:
    """Return rows as a pandas DataFrame."""
    try:
        import pandas
    except ModuleNotFoundError as exc:
        raise SetupError("DataFrames need pandas; install it with: pip install 'basic-batch[pandas]'") from exc
    names = ["custom_id", "index", "status", "choice", "text", "finish_reason", "completion_tokens", "error"]
    return pandas.DataFrame(table, columns=names)
