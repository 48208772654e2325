"""The frozen values that cross a border: prompt batches, requests, sampling parameters, partial events, statuses.

Knows no Redis, no SQL and no HTTP. Every value that lies on a wire or in a row carries a version `v`, so that an old
worker can tell a message it does not understand from one it does.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

MESSAGE_VERSION: Final = 1
CHAT_ENDPOINT: Final = "/v1/chat/completions"
COMPLETIONS_ENDPOINT: Final = "/v1/completions"
Endpoint = Literal["/v1/chat/completions", "/v1/completions"]


class Frozen(BaseModel):
    """A value that does not change and refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class JobStatus(StrEnum):
    """Status of a job, in OpenAI's words. Only moves forward; the last four are final."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """True when nothing about the job will change any more."""
        return self in FINAL_JOB_STATUSES


FINAL_JOB_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED})


class RequestStatus(StrEnum):
    """Status of one request of a job; the last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class ChatMessage(Frozen):
    """One turn of a conversation, as the chat template takes it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class SamplingParameters(Frozen):
    """How the tokens of one request are chosen. Defaults are OpenAI's."""

    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Cap per choice; none: to the context's end.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 decodes greedily.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this much probability.")
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="Keep the k likeliest tokens; 0 keeps all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Keep tokens at least this likely, relative to the likeliest.")
    n: int = Field(1, ge=1, le=128, description="Choices per request.")
    seed: int = Field(ge=-(2**63), le=2**63 - 1, description="Same seed and request, same text.")
    ignore_eos: bool = Field(False, description="Go on past the end-of-sequence token.")


class GenerationRequest(Frozen):
    """A request as it is stored in `requests.body`: everything a worker needs to write its text.

    It has either `messages` or a `prompt`. On the chat endpoint a prompt is one user message.
    """

    v: Literal[1] = MESSAGE_VERSION
    model: str
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    sampling: SamplingParameters


class PromptBatch(Frozen):
    """What a producer inside the cluster pushes onto Redis: one job, its prompts and their common parameters.

    `id` is the producer's own name for the batch: pushing the same id again adds nothing. `requests` holds the same
    objects as the lines of `POST /v1/jobs`: a string, or an object with `prompt` or `messages`, an optional
    `custom_id`, and parameters that win over `parameters`.
    """

    v: Literal[1] = MESSAGE_VERSION
    id: Annotated[str, Field(min_length=1, max_length=128)]
    model: str | None = None
    endpoint: Endpoint = CHAT_ENDPOINT
    requests: Annotated[tuple[Any, ...], Field(min_length=1)]
    parameters: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, str] | None = None


class Piece(Frozen):
    """A stretch of new text from one source: accepted draft tokens, or tokens the target chose itself."""

    text: str
    source: Literal["draft", "target"]


class PartialEvent(Frozen):
    """One event of one choice, published on `basic:partials:{job_id}` after its rows are committed.

    `seq` counts from 0 per (request, choice), so that a reader sees a gap. `tokens` and `accepted` count this event's
    tokens and how many of them were accepted draft tokens. A `finished` event carries `finish_reason`; a `failed`
    event carries `error`. An event of type `job` speaks of the whole job and carries `status`; it has no request.

    A `tokens` event with `snapshot` is told from SQL, not published: it carries all text of the choice up to `seq` and
    replaces what a reader has.
    """

    v: Literal[1] = MESSAGE_VERSION
    job_id: str
    request: str | None = None
    index: int | None = None
    choice: int = 0
    seq: int = 0
    type: Literal["started", "tokens", "finished", "failed", "job"]
    text: str = ""
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    accepted: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    status: JobStatus | None = None
    snapshot: bool = False


def model_name(target: str) -> str:
    """Return the public name of a target: a hub id as it is, a local directory by its last part."""
    return PurePath(target).name if target.startswith(("/", ".", "~")) else target


def model_queue(model: str) -> str:
    """Return the Celery queue on which doorbells for a model ring: a node consumes only what it holds."""
    return "basic.model." + re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
