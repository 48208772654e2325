"""The tables of the record, as SQLAlchemy maps them.

Rows are keyed by the identity of the work: a job, a request of it, a choice of the request, a checkpoint or a step of
the choice. Whatever is written twice finds its own row.

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

from storage.statuses import FILE_STATUSES, JobStatus, RequestStatus
from storage.views import create_views, drop_views


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


def _where_set(column: str, condition: str) -> Index:
    return Index(None, column, sqlite_where=text(condition), postgresql_where=text(condition))


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can speak of it."""

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


class Job(Base):
    """A job. Counts and token sums are kept here, so that its status is one row however large it is."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    model: Mapped[str]
    endpoint: Mapped[str]
    created_at: Mapped[float]
    started_at: Mapped[float | None]  # when its first request was claimed
    finished_at: Mapped[float | None]
    expires_at: Mapped[float]
    cancelling_at: Mapped[float | None]
    requests_total: Mapped[int]
    requests_completed: Mapped[int]
    requests_failed: Mapped[int]
    # Of requests that have an output; a prompt counts once, whatever the number of choices.
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    # Committed so far: in outputs, and in checkpoints of unfinished choices.
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    api_key_id: Mapped[str]  # '' where there is none: NULL would not take part in the unique constraint
    idempotency_key: Mapped[str | None]
    body_sha256: Mapped[str | None]
    doorbell_at: Mapped[float | None]  # when workers were last told that the job has requests for them
    # Of batches, which are jobs whose requests come as a file and whose answers leave as files.
    input_file_id: Mapped[str | None]  # none: the requests came inline
    completion_window: Mapped[str | None]  # as it was asked for
    output_expires_after_s: Mapped[float | None]
    validated_at: Mapped[float | None]  # none: the clerk has not read the input yet; its requests do not count
    finalizing_at: Mapped[float | None]
    output_file_id: Mapped[str | None]
    error_file_id: Mapped[str | None]
    errors: Mapped[list[Any] | None]  # why the input as a whole is bad: code, line, message, param
    usage: Mapped[dict[str, Any] | None]  # tokens of the lines of the output file
    # Which clerk reads the input or writes the output, and until when; the number grows with every claim.
    clerk_number: Mapped[int] = mapped_column(server_default="0")
    clerk_until: Mapped[float | None]
    # Of the newest commit that wrote something readers of the job are told (storage.event_log).
    event_number: Mapped[int] = mapped_column(BigInteger, server_default="0")
    retry_of: Mapped[str | None]  # the job whose failed requests these are
    priority: Mapped[int] = mapped_column(server_default=text("0"))  # 1: a person waits for it; claimed before all 0
    # What its requests may come to read and write at most, guessed at the door: what a key's limit is held against.
    tokens_asked: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    # Version of its requests' bodies. A worker that reads only older ones leaves the job to those that were upgraded.
    body_version: Mapped[int] = mapped_column(server_default=text("1"))
    # How many of its requests are decoded again with and without drafts after it ends (storage.speedup_checks); until
    # when a worker holds that work, and when it ended.
    compare_plain: Mapped[int] = mapped_column(server_default=text("0"))
    comparing_until: Mapped[float | None]
    comparing_by: Mapped[str | None]  # the worker that has it in hand
    compared_at: Mapped[float | None]
    compare_attempts: Mapped[int] = mapped_column(server_default=text("0"))  # taken in hand, and not handed back
    traceparent: Mapped[str | None]  # where the spans of its requests belong, for whoever traces (jobs.tracing)

    __table_args__ = (
        UniqueConstraint("api_key_id", "idempotency_key"),
        CheckConstraint(_one_of("status", JobStatus), name="status"),
        Index(None, "created_at", "id"),  # the list of jobs
        Index(None, "api_key_id", "created_at", "id"),  # the list of one owner's jobs
        Index(None, "status", "model"),  # the claim, the sweep of overdue jobs
        _where_set("compare_plain", "compare_plain > 0 AND compared_at IS NULL"),
    )


class Request(Base):
    """A request of a job, and who may write its results.

    The lease says so: `lease_owner` may while `lease_number` is the one it was given. Both stay when the request has
    ended, so that an owner that never learnt of its commit can be told that it was his.
    """

    __tablename__ = "requests"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    custom_id: Mapped[str]
    body: Mapped[dict[str, Any] | None]  # none: refused at the door
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
    event_number: Mapped[int | None] = mapped_column(BigInteger)  # of the commit that ended it
    expires_at: Mapped[float | None]  # its own deadline; the job's holds too
    # Requests that ran together when a worker was lost (storage.lease_recovery): such a group runs again by itself.
    suspect_group: Mapped[str | None]
    proven: Mapped[bool] = mapped_column(server_default=false())  # has committed tokens under the present lease
    # Of deaths of workers that were seen while it alone was in trial: how many, whether such a worker had served others
    # before, and the host of the first.
    lone_crashes: Mapped[int] = mapped_column(server_default=text("0"))
    lone_served: Mapped[bool] = mapped_column(server_default=false())
    lone_host: Mapped[str | None]

    __table_args__ = (
        CheckConstraint(_one_of("status", RequestStatus), name="status"),
        # The claim, and whether a job has anything left: both must not read the finished requests of a large job.
        Index(None, "job_id", "status", "request_index"),
        # In the order in which they ended.
        Index(
            "ix_requests_job_id_event_number_request_index",
            "job_id",
            "event_number",
            "request_index",
            sqlite_where=text("event_number IS NOT NULL"),
            postgresql_where=text("event_number IS NOT NULL"),
        ),
        # What went wrong, without a look at what went well.
        Index(
            "ix_requests_error_code",
            "error_code",
            "job_id",
            sqlite_where=text("error_code IS NOT NULL"),
            postgresql_where=text("error_code IS NOT NULL"),
        ),
        # Few rows have one of these at any time, and only those are in the index.
        _where_set("suspect_group", "suspect_group IS NOT NULL"),
        _where_set("expires_at", "expires_at IS NOT NULL AND finished_at IS NULL"),
    )


def _of_a_request() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["job_id", "request_index"], ["requests.job_id", "requests.request_index"], ondelete="CASCADE"
    )


class Partial(Base):
    """A checkpoint of a choice that is being written. Its rows vanish in the transaction that writes the output."""

    __tablename__ = "partials"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    choice_index: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    token_ids: Mapped[list[Any]]
    accepted: Mapped[list[Any]]  # per token: it was an accepted draft token
    text: Mapped[str]
    pieces: Mapped[list[Any]]  # [text, "draft" | "target"]
    steps: Mapped[list[Any]]  # the step rows, waiting for the output
    logprobs: Mapped[list[Any] | None]  # per token, if the request wants them (jobs.openai.logprobs)
    worker_id: Mapped[str]
    committed_at: Mapped[float]
    event_number: Mapped[int] = mapped_column(BigInteger, server_default="0")  # of the commit that wrote it

    __table_args__ = (_of_a_request(), Index("ix_partials_job_id_event_number", "job_id", "event_number"))


class Output(Base):
    """A finished choice."""

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
    pieces: Mapped[list[Any]]  # the text again, cut by who chose it: [text, "draft" | "target"]
    logprobs: Mapped[list[Any] | None]  # per token, if the request wanted them (jobs.openai.logprobs)
    worker_id: Mapped[str]
    started_at: Mapped[float]
    finished_at: Mapped[float]
    last_seq: Mapped[int]
    # A request may hold several prompts, each with several choices: its prompt tokens are those of these rows.
    first_of_prompt: Mapped[bool] = mapped_column(server_default=true())
    event_number: Mapped[int] = mapped_column(BigInteger, server_default="0")  # of the commit that wrote it
    # Of the checkpoints it was made of: event number, seq, characters, tokens, accepted. For readers who know some.
    checkpoints: Mapped[list[Any] | None]

    __table_args__ = (
        _of_a_request(),
        Index("ix_outputs_job_id_event_number", "job_id", "event_number", "request_index", "choice_index"),
    )


class File(Base):
    """A file of the OpenAI kind. Its row outlives its bytes: a list goes on behind a file that was deleted."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    api_key_id: Mapped[str]
    status: Mapped[str]  # writing: not to be seen yet; deleted: not to be seen again; cleared: the bytes are gone too

    __table_args__ = (
        CheckConstraint(_one_of("status", FILE_STATUSES), name="status"),
        Index(None, "created_at", "id"),  # the list of files
        Index(None, "api_key_id", "created_at", "id"),  # the list of one owner's files
        Index(None, "status", "expires_at"),  # the sweep
    )


class FileChunk(Base):
    """A stretch of the bytes of a file."""

    __tablename__ = "file_chunks"

    file_id: Mapped[str] = mapped_column(ForeignKey("files.id", ondelete="CASCADE"), primary_key=True)
    chunk_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes]


class DecodeStep(Base):
    """One choice in one decoding step. The emitted tokens of a choice's steps sum to its completion tokens."""

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
    decision: Mapped[str | None]  # tree, or why there was none (worker.engine.speculation.regret_guard)
    # [children shown, rank of the one drawn or null] for every node the target reached that had some; null: no tree
    reached: Mapped[list[Any] | None]

    __table_args__ = (
        _of_a_request(),
        CheckConstraint("accepted_tokens <= tree_nodes", name="accepted"),
        CheckConstraint("batch_sequences > 0", name="batch"),
    )


class DraftTree(Base):
    """The draft tree of one step, for a job that asked to see some. Rows lie beside those of `decode_steps`."""

    __tablename__ = "draft_trees"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    choice_index: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    nodes: Mapped[list[Any]]  # [parent, token id, text, probability, accepted]; the root first, its parent is -1
    bonus: Mapped[str]  # text of the target's own token behind the accepted path

    __table_args__ = (_of_a_request(),)


class SpeedupCheck(Base):
    """One request of a finished job that was decoded both ways once more, in steps that took turns.

    Times are shares of steps, as in `step_minutes`, for the same tokens in batches of the same sizes; prefill is in
    neither. NULL: no step of it can be compared, or there is an error: the comparison was given up.
    """

    __tablename__ = "comparisons"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    request_index: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str]  # '' with an error: no worker came through
    tokens: Mapped[int]
    drafted_ms: Mapped[float | None]  # as the job's requests are decoded
    plain_ms: Mapped[float | None]
    batch_sequences: Mapped[float | None]  # that shared a step with drafts, mean
    same_text: Mapped[bool | None]  # both ways wrote what the output says; anything else is a fault
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]

    __table_args__ = (_of_a_request(),)


def _of_a_job() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE")


class StepMinute(Base):
    """Sums of `decode_steps` by the minute. Step 0, the token from prefill, is kept apart from the others.

    Times are shares: what a step took, over the sequences that shared it. So they add up to the worker's time.
    """

    __tablename__ = "step_minutes"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    minute: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)  # Unix second it begins at
    worker_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)  # '': no drafts were shown
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
    # Of the steps that have a plain time to compare with:
    compared_steps: Mapped[int] = mapped_column(BigInteger)
    compared_tokens: Mapped[int] = mapped_column(BigInteger)
    compared_ms: Mapped[float]
    plain_ms: Mapped[float]  # what plain decoding would have taken for their tokens

    __table_args__ = (_of_a_job(), Index(None, "minute"))


class StepBatch(Base):
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
    """Counts of `decode_steps` without step 0, by how deep the tree was and how much of it was accepted."""

    __tablename__ = "step_depths"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)
    tree_depth: Mapped[int] = mapped_column(primary_key=True)
    accepted_tokens: Mapped[int] = mapped_column(primary_key=True)
    steps: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (_of_a_job(),)


class StepExpectation(Base):
    """Sums of the rows of `decode_steps` that have a tree, by the accepted tokens that were expected, in quarters."""

    __tablename__ = "step_expectations"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)
    quarter: Mapped[int] = mapped_column(primary_key=True)  # 4 x the expected tokens, rounded down
    steps: Mapped[int] = mapped_column(BigInteger)
    expected_accepted: Mapped[float]
    accepted_tokens: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (_of_a_job(),)


class StepRank(Base):
    """Counts over the steps with a tree, by the rank of a child: 0 is the likeliest."""

    __tablename__ = "step_ranks"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    drafter: Mapped[str] = mapped_column(primary_key=True)
    child_rank: Mapped[int] = mapped_column(primary_key=True)
    tried: Mapped[int] = mapped_column(BigInteger)  # nodes that were reached and had a child of this rank
    accepted: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (_of_a_job(),)


class WorkerEnergy(Base):
    """What a worker's devices drew in a minute, where they can tell (NVML)."""

    __tablename__ = "worker_energy"

    worker_id: Mapped[str] = mapped_column(primary_key=True)
    minute: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    joules: Mapped[float]


class Worker(Base):
    """A start of a worker process."""

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
    stopped_at: Mapped[float | None]  # when it left in order
    calibration: Mapped[dict[str, Any]]
    load: Mapped[dict[str, Any] | None]  # what it was doing when it last said so
    process: Mapped[str | None]  # which process of this machine: its neighbours see at once if it is dead
    lost_at: Mapped[float | None]  # when it was found dead or silent; cleared should it come back


class Served(Base):
    """A worker that has committed tokens of a request: its host serves, so a death of it speaks against what it ran."""

    __tablename__ = "served"

    worker_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    last_at: Mapped[float]  # when it last did so of a request that it had just taken up


class ApiKey(Base):
    """A key to the shim: its hash, what it may do, and how much. Rows stay: while there is one, nobody enters without.

    A limit that is NULL does not hold.
    """

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


class Election(Base):
    """Who holds an office that one process at a time must have, such as the reconciler's."""

    __tablename__ = "elections"

    office: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    term_ends_at: Mapped[float]


@event.listens_for(Base.metadata, "after_create")
def _create_views(target: MetaData, connection: Connection, **_: object) -> None:
    drop_views(connection)
    create_views(connection)


@event.listens_for(Base.metadata, "before_drop")
def _drop_views(target: MetaData, connection: Connection, **_: object) -> None:
    drop_views(connection)
