"""Frozen values that are written to and read from the database. Plain data: no SQLAlchemy, no pydantic.

Times are Unix seconds (UTC) on the database's clock; `*_ms` are milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from storage.steps.columns import StepColumns

RequestKey = tuple[str, int]  # (job_id, request_index)

HEARTBEAT_TIMEOUT_S: Final = 60.0  # a worker that has sent no heartbeat for longer counts as lost


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Why a request failed, in the fields of the API's error object."""

    code: str
    message: str
    param: str | None = None
    status_code: int = 400  # HTTP status in the error file of a batch


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to insert, without its requests."""

    id: str
    model: str
    endpoint: str
    window_s: float  # from creation to expiry
    metadata: Mapping[str, str] | None = None
    api_key_id: str | None = None
    idempotency_key: str | None = None  # unique per api_key_id
    body_sha256: str | None = None  # of the submitted body, to distinguish a repeat from a conflict
    input_file_id: str | None = None  # of a batch: its requests are read from this file later
    completion_window: str | None = None  # the window as submitted, such as 24h
    output_expires_after_s: float | None = None
    retry_of: str | None = None  # id of the job whose failed requests it runs again
    priority: int = 0  # 1: interactive, claimed first
    name: str | None = None
    priority_class: int = 0  # storage.priorities.Priority.rank
    max_concurrent: int | None = None  # of its requests that run at once; None: any number
    budget_tokens: int | None = None  # prompt and completion tokens after which it pauses
    budget_s: float | None = None  # seconds after which it pauses
    body_version: int = 1  # version of the request bodies; older workers skip the job
    compare_plain: int = 0  # number of requests to decode again, with and without drafts, after completion
    traceparent: str | None = None  # W3C trace context of the submission
    source_file_id: str | None = None  # uploaded file that the requests were read from
    verification_of: str | None = None  # id of the job of which it computes a sample again, without drafts


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request to insert: valid (`body`), or rejected at submission (`failure`: stored as failed)."""

    custom_id: str
    body: Mapping[str, Any] | None = None
    failure: RequestFailure | None = None
    tokens: int = 0  # upper bound of prompt plus completion tokens, estimated at submission
    prompt_tokens: int = 0  # of them, the prompt's, estimated from its bytes; not stored
    timeout_s: float | None = None  # from creation; the request fails after it, even if its job still has time
    size_bytes: int = 0  # approximate size of the body, to limit the size of one INSERT; 0: small
    identity: str | None = None  # by which equal requests are found; None: it is computed in any case


@dataclass(frozen=True, slots=True)
class NewKey:
    """An API key to insert. A limit of None is no limit."""

    id: str
    name: str
    secret_sha256: str
    scopes: tuple[str, ...]
    max_requests_queued: int | None = None
    max_tokens_queued: int | None = None
    max_requests_per_minute: int | None = None
    lasts_s: float | None = None  # lifetime; None: does not expire
    # Seconds to keep them after their job has ended, files after their creation; None: the installation's settings.
    prompts_kept_s: float | None = None
    outputs_kept_s: float | None = None
    files_kept_s: float | None = None
    steps_kept_s: float | None = None
    cache: bool = True  # its requests may be answered from the cache


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that the service failed (timeout, poison), not a worker, with the fields of its `failed` event."""

    job_id: str
    request_index: int
    custom_id: str
    seq: int  # after all events of its choice 0
    failure: RequestFailure


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one request's results. `number` is a fencing token that grows with every claim."""

    job_id: str
    request_index: int
    number: int

    @property
    def key(self) -> RequestKey:
        """Job id and index of the request."""
        return (self.job_id, self.request_index)


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row of the view `decode_steps`: one choice in one decoding step."""

    step: int  # 0 is the token from prefill
    tree_nodes: int  # draft nodes shown to the target, root not counted
    tree_depth: int
    accepted_tokens: int  # draft tokens that the target accepted; its own token is not counted
    emitted_tokens: int
    expected_accepted: float | None
    draft_ms: float
    verify_ms: float
    step_ms: float
    batch_sequences: int  # sequences that shared the step
    drafter: str | None
    plain_step_ms: float | None  # estimate of a plain step at this batch size; None: not comparable (shared a prefill)
    ended_at: float
    decision: str | None = None  # tree, or why none was used; None in rows of older versions
    # Per node that the target reached: its number of draft children, and the rank of the accepted one (None: rejected).
    reached: tuple[tuple[int, int | None], ...] | None = None  # None: no tree, or a row of an older version
    preemptions: int = 0  # how often the sequence lost its KV memory since its last step
    recomputed_tokens: int = 0  # tokens prefilled again for that
    tree: TreeRow | None = None  # for jobs that request their draft trees


@dataclass(frozen=True, slots=True)
class TreeRow:
    """The draft tree of a step; row of `draft_trees`."""

    # (parent, token id, text, acceptance probability, accepted); the root comes first, its parent is -1
    nodes: tuple[tuple[int, int, str, float, bool], ...]
    bonus: str  # text of the target's own token after the accepted path


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """New tokens of one choice since the last checkpoint; row of `partials`, and one `tokens` event."""

    choice_index: int
    seq: int
    token_ids: tuple[int, ...]
    accepted: tuple[bool, ...]  # per token: whether it is an accepted draft token
    text: str
    pieces: tuple[tuple[str, str], ...]  # (text, "draft" | "target")
    steps: StepColumns
    # Per token, as JSON, if requested. Not set in claims: outputs take them from the rows.
    logprobs: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """A finished choice; row of `outputs`."""

    choice_index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # stop | length
    prompt_tokens: int
    completion_tokens: int
    started_at: float
    finished_at: float
    last_seq: int  # seq of its `finished` event
    first_of_prompt: bool = True  # counts the prompt's tokens; other choices of the prompt do not
    reasoning_tokens: int | None = None  # None: the model marks no reasoning
    # What the answer returns of its prompt, as JSON; empty where the prompt's first choice has it. None: nothing.
    prompt: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """What a worker has decided about a request before its first token; columns of `requests`.

    Later owners continue by it, even if their model files or settings differ.
    """

    answer_format: Mapping[str, Any] | None = None  # jobs.messages.AnswerFormat; None: the text is the content
    sampling_defaults: Mapping[str, Any] | None = None  # sampling parameters of the model's generation config


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed request, with what earlier owners have committed."""

    lease: Lease
    custom_id: str
    endpoint: str
    priority: int  # 1: interactive
    body: Mapping[str, Any]
    attempts: int  # 1 the first time
    started_at: float | None  # of the first attempt
    checkpoints: tuple[Checkpoint, ...]  # ordered by (choice, seq)
    finished_choices: tuple[int, ...]  # choices that have outputs already
    traceparent: str | None = None  # W3C trace context of the submission
    plan: RequestPlan = RequestPlan()  # of earlier owners
    max_concurrent: int | None = None  # of the job
    verifies: bool = False  # computes a text again, to verify it: without drafts
    identity: str | None = None  # by which requests that wait for its answer are found (storage.cached_answers)

    @property
    def begun(self) -> bool:
        """True if earlier owners have committed tokens, so that their plan holds."""
        return bool(self.checkpoints or self.finished_choices)


@dataclass(frozen=True, slots=True)
class SampledRequest:
    """A request in the sample of a speed-up check, with the tokens of its first choice."""

    request_index: int
    body: Mapping[str, Any]
    token_ids: tuple[int, ...]
    plan: RequestPlan = RequestPlan()  # by which it was decoded


@dataclass(frozen=True, slots=True)
class SpeedupCheckClaim:
    """The sample of a completed job that a worker decodes again, with and without drafts."""

    job_id: str
    endpoint: str
    texts: tuple[SampledRequest, ...]


@dataclass(frozen=True, slots=True)
class SpeedupCheckResult:
    """Result of a speed-up check for one request, or its error; row of `comparisons`."""

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
    """What a flush writes for one request.

    `finished` choices become outputs. `ends` completes the request (all its choices have outputs); `failure` fails it.
    Step rows of a choice are taken from its checkpoints when it finishes.
    """

    lease: Lease
    checkpoints: tuple[Checkpoint, ...] = ()
    finished: tuple[FinishedChoice, ...] = ()
    ends: bool = False
    failure: RequestFailure | None = None
    plan: RequestPlan | None = None  # to write; None: nothing new


@dataclass(frozen=True, slots=True)
class FlushResult:
    """Result of a flush: requests that the worker must drop, and jobs that it ended."""

    lost: frozenset[RequestKey]  # fenced, cancelled or expired: their progress was not written
    ended_jobs: tuple[tuple[str, str], ...]  # (job_id, final status)
    returned: frozenset[RequestKey] = frozenset()  # to the queue, with their progress: the job is paused


@dataclass(frozen=True, slots=True)
class NewWorker:
    """A worker to register once it is ready to serve."""

    id: str
    hostname: str
    pid: int
    target: str  # public model name
    draft: str | None
    devices: tuple[str, ...]
    context_tokens: int  # max. prompt plus completion tokens of one sequence
    calibration: Mapping[str, Any]
    process: str | None = None  # process identity, to detect its death on the same host; None: unknown
    numerics: str | None = None  # fingerprint (storage.numerics)
