"""The tables, as SQLAlchemy models.

Primary keys are the identity of the work: job, request, choice, then checkpoint or step. So a repeated write hits the
row of the first one.

Times (`*_at`) are Unix seconds (UTC) on the database's clock, `*_ms` are milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    event,
    false,
    text,
    true,
)
from sqlalchemy.engine import Connection
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from storage.statuses import DELIVERY_STATUSES, FILE_STATUSES, STORED_JOB_STATUSES, UPLOAD_STATUSES, RequestStatus
from storage.steps.view import create_step_view, drop_step_view
from storage.views import create_views, drop_views


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


def _where_set(column: str, condition: str) -> Index:
    return Index(None, column, sqlite_where=text(condition), postgresql_where=text(condition))


class Base(DeclarativeBase):
    """Gives every constraint a name, so that migrations can refer to it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text(),
        float: Double(),
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
    }


class JobRow(Base):
    """A job. Its request counts and token sums are columns, so that reading a status costs one row for any job."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    model: Mapped[str]
    endpoint: Mapped[str]
    created_at: Mapped[float]
    started_at: Mapped[float | None]  # when the first request was claimed
    finished_at: Mapped[float | None]
    expires_at: Mapped[float]
    cancelling_at: Mapped[float | None]
    requests_total: Mapped[int]
    requests_completed: Mapped[int]
    requests_failed: Mapped[int]
    # Of requests with an output; each prompt counts once, for all its choices.
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    # Committed so far, in outputs and in checkpoints of open choices.
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")  # also its labels (JobLabel)
    api_key_id: Mapped[str]  # '' for no key: NULL would not count in the unique constraint
    idempotency_key: Mapped[str | None]
    body_sha256: Mapped[str | None]
    doorbell_at: Mapped[float | None]  # when workers were last notified of queued requests
    # Batches only: jobs with an input file and output files.
    input_file_id: Mapped[str | None]  # NULL: the requests came inline
    completion_window: Mapped[str | None]  # as submitted, such as 24h
    output_expires_after_s: Mapped[float | None]
    validated_at: Mapped[float | None]  # NULL: the input is still being read, and its requests do not count yet
    finalizing_at: Mapped[float | None]
    output_file_id: Mapped[str | None]
    error_file_id: Mapped[str | None]
    errors: Mapped[list[Any] | None]  # of an invalid input file: code, line, message, param
    usage: Mapped[dict[str, Any] | None]  # token usage of the output file
    # Lease of the batch-file processor: fencing token, which grows with every claim, and end of the lease.
    clerk_number: Mapped[int] = mapped_column(server_default="0")
    clerk_until: Mapped[float | None]
    # Event number of the newest commit with events for readers (storage.event_log).
    event_number: Mapped[int] = mapped_column(BigInteger, server_default="0")
    retry_of: Mapped[str | None]  # id of the job whose failed requests it runs again
    priority: Mapped[int] = mapped_column(server_default=text("0"))  # 1: interactive, claimed before all 0
    # Upper bound of the prompt and completion tokens of its requests, estimated at submission, for the key's limits.
    tokens_asked: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    # Version of the request bodies. Workers that read only older versions skip the job.
    body_version: Mapped[int] = mapped_column(server_default=text("1"))
    # Speed-up check (storage.speedup_checks): size of the sample, lease of the worker, end, attempts that count.
    compare_plain: Mapped[int] = mapped_column(server_default=text("0"))
    comparing_until: Mapped[float | None]
    comparing_by: Mapped[str | None]  # worker id
    compared_at: Mapped[float | None]
    compare_attempts: Mapped[int] = mapped_column(server_default=text("0"))  # claimed and not released
    traceparent: Mapped[str | None]  # W3C trace context of its spans (jobs.tracing)
    name: Mapped[str | None]
    # Paused (storage.pausing): none of its requests is claimed. `status` stays as it is.
    paused_at: Mapped[float | None]
    pause_reason: Mapped[str | None]
    priority_class: Mapped[int] = mapped_column(server_default=text("0"))  # storage.priorities.Priority.rank
    max_concurrent: Mapped[int | None]  # of its requests that run at once, over all workers
    source_file_id: Mapped[str | None]  # uploaded file that the requests were read from at submission; not of a batch
    erased_at: Mapped[float | None]  # hidden since then; its rows are deleted in pieces (storage.erasure)
    # Deleted because of their age (storage.prune).
    prompts_deleted_at: Mapped[float | None]
    outputs_deleted_at: Mapped[float | None]
    budget_tokens: Mapped[int | None] = mapped_column(BigInteger)  # storage.budgets
    budget_s: Mapped[float | None]
    paused_s: Mapped[float] = mapped_column(server_default=text("0"))  # of pauses that are over, since its start
    pilot_only: Mapped[bool] = mapped_column(server_default=false())  # only its pilot may run (storage.pilots)
    # The job of which it computes a sample again, without drafts (storage.verifications): it is erased with that job.
    verification_of: Mapped[str | None]
    # Of its requests and tokens: those that were copied from earlier answers (storage.cached_answers).
    requests_cached: Mapped[int] = mapped_column(server_default=text("0"))
    cached_prompt_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    cached_completion_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))

    __table_args__ = (
        UniqueConstraint("api_key_id", "idempotency_key"),
        CheckConstraint(_one_of("status", STORED_JOB_STATUSES), name="status"),
        Index(None, "created_at", "id"),  # the list of jobs
        Index(None, "api_key_id", "created_at", "id"),  # the list of one owner's jobs
        Index(None, "status", "model"),  # the claim, the sweep of overdue jobs
        Index(None, "status", "created_at", "id"),  # the list of jobs with a status
        Index(
            "ix_jobs_name_created_at_id",
            "name",
            "created_at",
            "id",
            sqlite_where=text("name IS NOT NULL"),
            postgresql_where=text("name IS NOT NULL"),
        ),
        _where_set("compare_plain", "compare_plain > 0 AND compared_at IS NULL"),
        _where_set("erased_at", "erased_at IS NOT NULL"),
        _where_set("input_file_id", "input_file_id IS NOT NULL"),
        _where_set("source_file_id", "source_file_id IS NOT NULL"),
        _where_set("verification_of", "verification_of IS NOT NULL"),
    )


class JobLabel(Base):
    """A label of a job, a pair of its metadata: the index of the list of jobs with a label (storage.labels)."""

    __tablename__ = "job_labels"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]
    created_at: Mapped[float]  # of the job

    __table_args__ = (Index(None, "key", "value", "created_at", "job_id"),)


class JobText(Base):
    """What a search finds a job by: its name and labels, in lower case. A job without them has no row."""

    __tablename__ = "job_texts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    text: Mapped[str]


class Request(Base):
    """A request of a job, and the lease of the worker that may write its results.

    `lease_number` is a fencing token. Owner and number stay when the request has ended, so that an owner that repeats
    its last flush is recognised.
    """

    __tablename__ = "requests"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    custom_id: Mapped[str]
    body: Mapped[dict[str, Any] | None]  # NULL: rejected at submission
    status: Mapped[str]
    attempts: Mapped[int]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_param: Mapped[str | None]
    error_status_code: Mapped[int | None]
    lease_owner: Mapped[str | None]
    lease_number: Mapped[int]
    lease_expires_at: Mapped[float | None]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    event_number: Mapped[int | None] = mapped_column(BigInteger)  # event number of the commit that ended it
    expires_at: Mapped[float | None]  # its own deadline, besides the job's
    # Quarantine group (storage.lease_recovery): suspects of a lost worker that run again without others.
    suspect_group: Mapped[str | None]
    proven: Mapped[bool] = mapped_column(
        server_default=false()
    )  # cleared: has committed tokens under the present lease
    # Observed worker crashes while it ran alone in quarantine: how many, whether one of these workers had served other
    # requests before, and the hostname of the first.
    lone_crashes: Mapped[int] = mapped_column(server_default=text("0"))
    lone_served: Mapped[bool] = mapped_column(server_default=false())
    lone_host: Mapped[str | None]
    # Written by the worker no later than the first tokens: how the text splits (jobs.messages.AnswerFormat; NULL: it is
    # the content), and the sampling parameters that the model's generation config gave.
    answer_format: Mapped[dict[str, Any] | None]
    sampling_defaults: Mapped[dict[str, Any] | None]
    # Hash of its owner, model and everything that decides its answer (jobs.submission.parameters.identity). NULL: it is
    # neither answered from the cache nor a source of answers, or it was answered from there.
    identity: Mapped[str | None]
    # What the workers that claimed it have in common, beside the request, that decides its answer: hash of numerics,
    # context and sampling defaults. NULL: not claimed, or by workers that differ.
    cache_scope: Mapped[str | None]

    __table_args__ = (
        CheckConstraint(_one_of("status", RequestStatus), name="status"),
        # The claim, and whether a job has open requests: neither may read the finished requests of a large job.
        Index(None, "job_id", "status", "request_index"),
        # The event log: requests in the order in which they ended.
        Index(
            "ix_requests_job_id_event_number_request_index",
            "job_id",
            "event_number",
            "request_index",
            sqlite_where=text("event_number IS NOT NULL"),
            postgresql_where=text("event_number IS NOT NULL"),
        ),
        # Errors, without reading the requests that succeeded.
        Index(
            "ix_requests_error_code",
            "error_code",
            "job_id",
            sqlite_where=text("error_code IS NOT NULL"),
            postgresql_where=text("error_code IS NOT NULL"),
        ),
        # Partial indexes: few rows have these at any time.
        Index(
            "ix_requests_identity_status",
            "identity",
            "status",
            sqlite_where=text("identity IS NOT NULL"),
            postgresql_where=text("identity IS NOT NULL"),
        ),
        _where_set("suspect_group", "suspect_group IS NOT NULL"),
        _where_set("expires_at", "expires_at IS NOT NULL AND finished_at IS NULL"),
    )


def _of_a_request() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["job_id", "request_index"], ["requests.job_id", "requests.request_index"], ondelete="CASCADE"
    )


class Partial(Base):
    """A checkpoint of an open choice. The transaction that writes the output deletes its checkpoints."""

    __tablename__ = "partials"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    choice_index: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    token_ids: Mapped[list[Any]]
    accepted: Mapped[list[Any]]  # per token: whether it is an accepted draft token
    text: Mapped[str]
    pieces: Mapped[list[Any]]  # [text, "draft" | "target"]
    steps: Mapped[list[Any]]  # of older versions: rows of `decode_steps`
    step_columns: Mapped[dict[str, Any] | None]  # storage.steps.columns; `packed_steps` when the output is written
    logprobs: Mapped[list[Any] | None]  # per token, if requested (jobs.openai.logprobs)
    worker_id: Mapped[str]
    committed_at: Mapped[float]
    event_number: Mapped[int] = mapped_column(BigInteger, server_default="0")  # event number of its commit
    numerics: Mapped[str | None]  # fingerprint of the worker (storage.numerics)

    __table_args__ = (_of_a_request(), Index("ix_partials_job_id_event_number", "job_id", "event_number"))


class ChoiceOutput(Base):
    """A finished choice: its text, tokens and log-probabilities. Written once, by the flush that finishes it."""

    __tablename__ = "outputs"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    choice_index: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    finish_reason: Mapped[str]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    accepted_tokens: Mapped[int]  # of the completion: accepted draft tokens
    token_ids: Mapped[list[Any]]
    pieces: Mapped[list[Any]]  # the text, split by source: [text, "draft" | "target"]
    logprobs: Mapped[list[Any] | None]  # per token, if requested (jobs.openai.logprobs)
    # What the answer returns of its prompt (jobs.openai.prompt_details); empty where the prompt's first choice has it.
    prompt: Mapped[dict[str, Any] | None]
    worker_id: Mapped[str]
    started_at: Mapped[float]
    finished_at: Mapped[float]
    last_seq: Mapped[int]
    # A request may have several prompts with several choices each: the prompt tokens of these rows count.
    first_of_prompt: Mapped[bool] = mapped_column(server_default=true())
    event_number: Mapped[int] = mapped_column(BigInteger, server_default="0")  # event number of its commit
    # [event number, seq, characters, tokens, accepted] of its checkpoints, for readers that have received some.
    checkpoints: Mapped[list[Any] | None]
    reasoning_tokens: Mapped[int | None]  # of the completion, markers included; NULL: the model marks no reasoning
    # What fixed the bits of the text: a fingerprint (storage.numerics), or several with commas between them, in order,
    # if it was resumed where other bits were possible. NULL: computed by an older version.
    numerics: Mapped[str | None]
    cached_from: Mapped[str | None]  # job id/request index of the answer that it is a copy of; NULL: it was computed

    __table_args__ = (
        _of_a_request(),
        Index("ix_outputs_job_id_event_number", "job_id", "event_number", "request_index", "choice_index"),
    )


class File(Base):
    """A file of the files API. Its row outlives its bytes, so that lists can continue after a deleted file."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    api_key_id: Mapped[str]
    status: Mapped[str]  # storage.statuses.FILE_STATUSES

    __table_args__ = (
        CheckConstraint(_one_of("status", FILE_STATUSES), name="status"),
        Index(None, "created_at", "id"),  # the list of files
        Index(None, "api_key_id", "created_at", "id"),  # the list of one owner's files
        Index(None, "status", "expires_at"),  # the sweep
    )


class FileChunk(Base):
    """A chunk of the bytes of a file."""

    __tablename__ = "file_chunks"

    file_id: Mapped[str] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"), primary_key=True)
    chunk_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes]


class UploadRow(Base):
    """A file that arrives in parts."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    api_key_id: Mapped[str]
    status: Mapped[str]  # storage.statuses.UPLOAD_STATUSES; past expires_at a pending one has expired
    file_id: Mapped[str | None]  # once completed
    file_expires_after_s: Mapped[float | None]
    created_at: Mapped[float]
    expires_at: Mapped[float]

    __table_args__ = (CheckConstraint(_one_of("status", UPLOAD_STATUSES), name="status"),)


class UploadPartRow(Base):
    """A part of an upload. Its chunks are those of the unfinished file with the same id."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    chunks: Mapped[int]
    created_at: Mapped[float]


class PackedSteps(Base):
    """Up to 128 steps of one choice, a column in one text (storage.steps.packing); `decode_steps` shows them as rows.

    A text has a character per step: 32 + its distance from the minimum. NULL: the same in all steps. Times are
    hundredths of a millisecond, expectations thousandths of a token.
    """

    __tablename__ = "packed_steps"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    choice_index: Mapped[int] = mapped_column(primary_key=True)
    first_step: Mapped[int] = mapped_column(primary_key=True)
    steps: Mapped[int]
    worker_id: Mapped[str]
    min_ended_ms: Mapped[int] = mapped_column(BigInteger)  # Unix milliseconds
    min_tree_nodes: Mapped[int]
    min_tree_depth: Mapped[int]
    min_accepted_tokens: Mapped[int]
    min_emitted_tokens: Mapped[int]
    min_expected_accepted: Mapped[int | None]  # NULL: none in all steps
    min_draft_ms: Mapped[int]
    min_verify_ms: Mapped[int]
    min_step_ms: Mapped[int]
    min_batch_sequences: Mapped[int]
    min_plain_step_ms: Mapped[int | None]
    min_preemptions: Mapped[int] = mapped_column(server_default="0")
    min_recomputed_tokens: Mapped[int] = mapped_column(server_default="0")
    ended_ms: Mapped[str | None]
    tree_nodes: Mapped[str | None]
    tree_depth: Mapped[str | None]
    accepted_tokens: Mapped[str | None]
    emitted_tokens: Mapped[str | None]
    expected_accepted: Mapped[str | None]  # 32: none; 33: the minimum
    draft_ms: Mapped[str | None]
    verify_ms: Mapped[str | None]
    step_ms: Mapped[str | None]
    batch_sequences: Mapped[str | None]
    plain_step_ms: Mapped[str | None]  # 32: none; 33: the minimum
    preemptions: Mapped[str | None]
    recomputed_tokens: Mapped[str | None]
    # Numbers of elements of the JSON lists beside them; NULL: the first. A list of NULL: none in all steps.
    drafter: Mapped[str | None]
    decision: Mapped[str | None]
    reached: Mapped[str | None]
    drafters: Mapped[str | None]
    decisions: Mapped[str | None]
    reached_lists: Mapped[str | None]

    __table_args__ = (_of_a_request(), CheckConstraint("steps > 0", name="steps"))


class Views(DeclarativeBase):
    """Views that are mapped like tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = Base.type_annotation_map


class DecodeStep(Views):
    """One choice in one decoding step: a row of the view over `packed_steps`.

    The emitted tokens of a choice's steps sum to its completion tokens. Times are rounded to 0.01 ms,
    `expected_accepted` to 0.001 and `ended_at` to 0.001 s.
    """

    __tablename__ = "decode_steps"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    choice_index: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)  # 0 is the token from prefill
    tree_nodes: Mapped[int]
    tree_depth: Mapped[int]
    accepted_tokens: Mapped[int]
    emitted_tokens: Mapped[int]
    expected_accepted: Mapped[float | None]
    draft_ms: Mapped[float]
    verify_ms: Mapped[float]
    step_ms: Mapped[float]
    batch_sequences: Mapped[int]
    drafter: Mapped[str | None]
    plain_step_ms: Mapped[float | None]
    ended_at: Mapped[float]
    worker_id: Mapped[str]
    # tree, or why none was used (worker.engine.speculation.regret_guard); cached: not a step, but a copy of all tokens
    decision: Mapped[str | None]
    # [draft children, rank of the accepted one or null] of each inner node that the target reached; NULL: no tree
    reached: Mapped[list[Any] | None]
    preemptions: Mapped[int]  # how often the sequence lost its KV memory since its last step
    recomputed_tokens: Mapped[int]  # tokens prefilled again for that


class DraftTree(Base):
    """The draft tree of one step, for jobs that request their trees. Keys are those of `decode_steps`."""

    __tablename__ = "draft_trees"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    choice_index: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    nodes: Mapped[list[Any]]  # [parent, token id, text, probability, accepted]; root first, with parent -1
    bonus: Mapped[str]  # text of the target's own token after the accepted path

    __table_args__ = (_of_a_request(),)


class CheckedRequest(Base):
    """One request of a completed job, decoded again with and without drafts in interleaved steps.

    Times are shares of steps, as in `step_minutes`, for the same tokens at the same batch sizes, without prefill.
    NULL: no comparable step, or the check failed with an error.
    """

    __tablename__ = "comparisons"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str]  # '' with an error
    tokens: Mapped[int]
    drafted_ms: Mapped[float | None]  # with drafts
    plain_ms: Mapped[float | None]
    batch_sequences: Mapped[float | None]  # mean batch size of the steps with drafts
    same_text: Mapped[bool | None]  # both runs reproduced the output; false is a bug
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]

    __table_args__ = (_of_a_request(),)


def _of_a_job() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE")


class PilotRow(Base):
    """A request of a job's pilot (storage.pilots)."""

    __tablename__ = "pilot_requests"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)

    __table_args__ = (_of_a_job(),)


class StepMinute(Base):
    """Sums of `decode_steps` by minute. Step 0, the token from prefill, has columns of its own.

    Times are shares: the time of a step over the number of its sequences. So they add up to the worker's time.
    """

    __tablename__ = "step_minutes"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    minute: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)  # start, Unix seconds
    worker_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)  # '': no drafts
    decision: Mapped[str] = mapped_column(primary_key=True)  # '': not recorded
    first_steps: Mapped[int] = mapped_column(BigInteger)
    first_tokens: Mapped[int] = mapped_column(BigInteger)
    steps: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    tree_nodes: Mapped[int] = mapped_column(BigInteger)
    accepted_tokens: Mapped[int] = mapped_column(BigInteger)
    expected_accepted: Mapped[float]
    draft_ms: Mapped[float]
    verify_ms: Mapped[float]
    step_ms: Mapped[float]
    # Of the steps with a plain step time to compare with:
    compared_steps: Mapped[int] = mapped_column(BigInteger)
    compared_tokens: Mapped[int] = mapped_column(BigInteger)
    compared_ms: Mapped[float]
    plain_ms: Mapped[float]  # estimated time of plain decoding for the same tokens

    __table_args__ = (_of_a_job(), Index(None, "minute"))


class StepBatchSize(Base):
    """Sums of `decode_steps` without step 0, by the number of sequences that shared the step."""

    __tablename__ = "step_batches"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)
    batch_sequences: Mapped[int] = mapped_column(primary_key=True)
    steps: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    tree_nodes: Mapped[int] = mapped_column(BigInteger)
    step_ms: Mapped[float]  # shares, as in `step_minutes`

    __table_args__ = (_of_a_job(),)


class StepDepth(Base):
    """Counts of `decode_steps` without step 0, by tree depth and accepted tokens."""

    __tablename__ = "step_depths"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)
    tree_depth: Mapped[int] = mapped_column(primary_key=True)
    accepted_tokens: Mapped[int] = mapped_column(primary_key=True)
    steps: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (_of_a_job(),)


class StepExpectation(Base):
    """Sums of the rows of `decode_steps` with a tree, by expected accepted tokens in quarters."""

    __tablename__ = "step_expectations"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)
    quarter: Mapped[int] = mapped_column(primary_key=True)  # 4 x expected accepted tokens, rounded down
    steps: Mapped[int] = mapped_column(BigInteger)
    expected_accepted: Mapped[float]
    accepted_tokens: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (_of_a_job(),)


class StepRank(Base):
    """Counts over the steps with a tree, by child rank: 0 is the child with the highest draft probability."""

    __tablename__ = "step_ranks"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)
    child_rank: Mapped[int] = mapped_column(primary_key=True)
    tried: Mapped[int] = mapped_column(BigInteger)  # reached nodes with a child of this rank
    accepted: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (_of_a_job(),)


class WorkerEnergy(Base):
    """Energy of a worker's devices by minute, where NVML reports it."""

    __tablename__ = "worker_energy"

    worker_id: Mapped[str] = mapped_column(primary_key=True)
    minute: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    joules: Mapped[float]


class Worker(Base):
    """A worker process; a restart is a new row."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    hostname: Mapped[str]
    pid: Mapped[int]
    target: Mapped[str]
    draft: Mapped[str | None]
    devices: Mapped[list[Any]]
    context_tokens: Mapped[int]
    started_at: Mapped[float]
    last_seen_at: Mapped[float]
    stopped_at: Mapped[float | None]  # clean shutdown
    calibration: Mapped[dict[str, Any]]
    load: Mapped[dict[str, Any] | None]  # last reported load
    process: Mapped[str | None]  # process identity, to detect its death on the same host at once
    lost_at: Mapped[float | None]  # found dead or silent; NULL again after the next heartbeat
    numerics: Mapped[str | None]  # fingerprint (storage.numerics)


class NumericsRow(Base):
    """The parts of a numerics fingerprint: weights, dtype, device kind, kernels, libraries (storage.numerics)."""

    __tablename__ = "numerics"

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    parts: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Served(Base):
    """A worker that has committed tokens: its host works, so a later crash counts against the request it ran."""

    __tablename__ = "served"

    worker_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    last_at: Mapped[float]  # first tokens of the request that it cleared last


class ApiKey(Base):
    """An API key: hash, scopes and limits (NULL: no limit). Revoked rows stay: with any row, the API requires a key."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    secret_sha256: Mapped[str]
    scopes: Mapped[list[Any]]
    max_requests_queued: Mapped[int | None]
    max_tokens_queued: Mapped[int | None] = mapped_column(BigInteger)
    max_requests_per_minute: Mapped[int | None]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    # Seconds to keep them after their job has ended, files after their creation; NULL: the installation's settings.
    prompts_kept_s: Mapped[float | None]
    outputs_kept_s: Mapped[float | None]
    files_kept_s: Mapped[float | None]
    steps_kept_s: Mapped[float | None]
    cache: Mapped[bool] = mapped_column(server_default=true())  # its requests may be answered from the cache


class WebhookEndpoint(Base):
    """A URL that is called when jobs of a key end (storage.webhooks)."""

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(primary_key=True)
    api_key_id: Mapped[str]
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[Any]]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))  # NULL: of all jobs
    all_keys: Mapped[bool] = mapped_column(server_default=false())  # of the jobs of all keys
    secret: Mapped[str]  # signs: it can't be a hash
    old_secret: Mapped[str | None]
    old_secret_until: Mapped[float | None]
    created_at: Mapped[float]
    updated_at: Mapped[float]

    __table_args__ = (_where_set("job_id", "job_id IS NOT NULL"),)


class WebhookDelivery(Base):
    """One event for one endpoint: the outbox. Written by the transaction that ends the job.

    No foreign key to the endpoint: one that is removed meanwhile must not fail the transaction of a worker.
    """

    __tablename__ = "webhook_deliveries"

    id: Mapped[str] = mapped_column(primary_key=True)  # the same in every attempt: `webhook-id`
    endpoint_id: Mapped[str] = mapped_column(index=True)
    event_type: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[float]
    status: Mapped[str]  # storage.statuses.DELIVERY_STATUSES
    attempts: Mapped[int]  # the fencing token of the sender
    queued_at: Mapped[float]  # created, or queued again by hand: retries end a day later
    next_at: Mapped[float]  # when it is due; while it is sent, the end of the sender's claim
    last_status_code: Mapped[int | None]
    last_error: Mapped[str | None]  # one line
    ended_at: Mapped[float | None]

    __table_args__ = (
        CheckConstraint(_one_of("status", DELIVERY_STATUSES), name="status"),
        _where_set("next_at", "status = 'pending'"),
    )


class SpeculationStateRow(Base):
    """What workers have learned about a draft on a kind of device: a new process continues from it."""

    __tablename__ = "speculation_states"

    key: Mapped[str] = mapped_column(primary_key=True)  # hash of all that changes what drafts cost and gain
    device: Mapped[str]
    target: Mapped[str]
    draft: Mapped[str | None]
    state: Mapped[dict[str, Any]]  # worker.engine.speculation.state
    updated_at: Mapped[float]


class Election(Base):
    """The leader of a role that one process at a time has (storage.leader_election), such as the reconciler."""

    __tablename__ = "elections"

    office: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    term_ends_at: Mapped[float]


@event.listens_for(Base.metadata, "after_create")
def _create_views(target: MetaData, connection: Connection, **_: object) -> None:
    drop_views(connection)
    drop_step_view(connection)
    create_views(connection)
    create_step_view(connection)


@event.listens_for(Base.metadata, "before_drop")
def _drop_views(target: MetaData, connection: Connection, **_: object) -> None:
    drop_views(connection)
    drop_step_view(connection)
