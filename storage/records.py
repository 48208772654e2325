"""The frozen values that go into and come out of the record. Plain data: no SQLAlchemy, no pydantic.

Times are Unix seconds (UTC) on the database's clock; `*_ms` are milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

RequestKey = tuple[str, int]  # (job_id, request_index)

HEARTBEAT_TIMEOUT_S: Final = 60.0  # a worker that has sent no heartbeat for longer counts as lost


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Why a request failed, in the words of the error envelope."""

    code: str
    message: str
    param: str | None = None
    status_code: int = 400  # HTTP status the request would have been answered with


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job about to be recorded."""

    id: str
    model: str
    endpoint: str
    window_s: float  # seconds from creation to expiry
    metadata: Mapping[str, str] | None = None
    api_key_id: str | None = None
    idempotency_key: str | None = None  # unique per api_key_id
    body_sha256: str | None = None  # of the submitted body, to tell a repeat from a conflict
    input_file_id: str | None = None  # a batch: its requests are still to be read from this file
    completion_window: str | None = None  # the window as it was asked for
    output_expires_after_s: float | None = None
    retry_of: str | None = None  # the job whose failed requests it runs again
    priority: int = 0  # 1: a person waits for it
    body_version: int = 1  # of the bodies of its requests: a worker must be able to read them
    compare_plain: int = 0  # so many of its requests are decoded both ways when it is done
    traceparent: str | None = None  # where its spans belong, for whoever traces


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request about to be recorded: valid (`body`), or refused at the door (`failure`: the row is born failed)."""

    custom_id: str
    body: Mapping[str, Any] | None = None
    failure: RequestFailure | None = None
    tokens: int = 0  # that it may come to read and write at most, as far as the door can say
    timeout_s: float | None = None  # seconds from creation after which it fails, whatever its job may still have
    size_bytes: int = 0  # of its body, about: what is written together must not be large; 0: small


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key to the shim about to be recorded. A limit of None does not hold."""

    id: str
    name: str
    secret_sha256: str
    scopes: tuple[str, ...]
    max_requests_queued: int | None = None
    max_tokens_queued: int | None = None
    max_requests_per_minute: int | None = None
    lasts_s: float | None = None  # seconds until it expires


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that failed in nobody's hands, with what its `failed` event must say."""

    job_id: str
    request_index: int
    custom_id: str
    seq: int  # behind all events of its choice 0
    failure: RequestFailure


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one request's results. `number` grows with every claim: an older one writes nothing."""

    job_id: str
    request_index: int
    number: int

    @property
    def key(self) -> RequestKey:
        """The request this lease is about."""
        return (self.job_id, self.request_index)


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row of `decode_steps`: one choice in one decoding step."""

    step: int  # 0 is the token from prefill
    tree_nodes: int  # draft nodes shown to the target, root not counted
    tree_depth: int
    accepted_tokens: int  # draft tokens kept; the target's own token is not one of them
    emitted_tokens: int
    expected_accepted: float | None
    draft_ms: float
    verify_ms: float
    step_ms: float
    batch_sequences: int  # sequences that shared the step
    drafter: str | None
    plain_step_ms: float | None  # a plain step at this batch size on this worker; None: not comparable (prefill shared)
    ended_at: float
    decision: str | None = None  # tree, or why there was none; rows written before it was recorded have none
    # Per node the target reached: draft children shown below it, and the rank of the one it drew (none of them: None).
    reached: tuple[tuple[int, int | None], ...] | None = None  # None: no tree, or written before it was recorded
    tree: TreeRow | None = None  # for jobs that asked to see their trees


def known_step_columns(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step from a checkpoint without the columns that only a newer version knows."""
    return {name: value for name, value in stored.items() if name in StepRow.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class TreeRow:
    """The draft tree of a step, as text: row of `draft_trees`."""

    # (parent, token id, text, probability that the target accepts it, accepted); the root first, its parent is -1
    nodes: tuple[tuple[int, int, str, float, bool], ...]
    bonus: str  # the target's own token behind the accepted path


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """New tokens of one choice since the last checkpoint; row of `partials`, and one `tokens` event."""

    choice_index: int
    seq: int
    token_ids: tuple[int, ...]
    accepted: tuple[bool, ...]  # per token: it was an accepted draft token
    text: str
    pieces: tuple[tuple[str, str], ...]  # (text, "draft" | "target")
    steps: tuple[StepRow, ...]
    # Per token, as JSON, if the request wants them. Not read back: the output takes them from the rows.
    logprobs: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """A choice that has ended: row of `outputs`."""

    choice_index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # stop | length
    prompt_tokens: int
    completion_tokens: int
    started_at: float
    finished_at: float
    last_seq: int  # seq of its `finished` event
    first_of_prompt: bool = True  # no other choice counts the tokens of this prompt


@dataclass(frozen=True, slots=True)
class Claim:
    """A request handed to a worker, with what an earlier owner had already committed."""

    lease: Lease
    custom_id: str
    endpoint: str
    priority: int  # 1: a person waits for it
    body: Mapping[str, Any]
    attempts: int  # 1 the first time
    started_at: float | None  # of the first attempt
    checkpoints: tuple[Checkpoint, ...]  # ordered by (choice, seq)
    finished_choices: tuple[int, ...]  # choices whose outputs are already recorded
    traceparent: str | None = None  # where its spans belong, for whoever traces


@dataclass(frozen=True, slots=True)
class SampledRequest:
    """A request of a finished job, and what its first choice says."""

    request_index: int
    body: Mapping[str, Any]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpeedupCheckClaim:
    """The sample of a finished job that a worker is to decode both ways."""

    job_id: str
    endpoint: str
    texts: tuple[SampledRequest, ...]


@dataclass(frozen=True, slots=True)
class SpeedupCheckResult:
    """A request that was decoded both ways, or the error that came instead; row of `comparisons`."""

    request_index: int
    tokens: int = 0
    drafted_ms: float | None = None
    plain_ms: float | None = None
    batch_sequences: float | None = None
    same_text: bool | None = None
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """What one held request has to write in a flush.

    `finished` choices become outputs at once. With `ends` the request is completed (all its choices have outputs);
    with `failure` it is failed. Step rows of a choice are taken from its checkpoints when it finishes.
    """

    lease: Lease
    checkpoints: tuple[Checkpoint, ...] = ()
    finished: tuple[FinishedChoice, ...] = ()
    ends: bool = False
    failure: RequestFailure | None = None


@dataclass(frozen=True, slots=True)
class FlushResult:
    """What a flush found: leases that are no longer ours (fenced, cancelled or expired), and jobs that just ended."""

    lost: frozenset[RequestKey]
    ended_jobs: tuple[tuple[str, str], ...]  # (job_id, final status)


@dataclass(frozen=True, slots=True)
class NewWorker:
    """How a worker introduces itself."""

    id: str
    hostname: str
    pid: int
    target: str  # public model name
    draft: str | None
    devices: tuple[str, ...]
    context_tokens: int  # longest prompt plus completion it can hold
    calibration: Mapping[str, Any]
    process: str | None = None  # which process it is, for neighbours on its machine; None: they can't know
