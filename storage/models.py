"""The tables of the record, as SQLAlchemy maps them.

writes, leases, queries -> [models] <- migrations.  Rows are keyed by the identity of the work: a job, a request of it,
a choice of the request, a checkpoint or a step of the choice. Whatever is written twice finds its own row.

Times (`*_at`) are Unix seconds (UTC) on the database's clock, `*_ms` are milliseconds.
"""

from __future__ import annotations

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
    true,
)
from sqlalchemy.engine import Connection
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from storage.views import create_views, drop_views

JOB_STATUSES = (
    "validating",
    "in_progress",
    "finalizing",
    "cancelling",
    "completed",
    "failed",
    "expired",
    "cancelled",
)
REQUEST_STATUSES = ("queued", "running", "completed", "failed", "expired", "cancelled")
FILE_STATUSES = ("writing", "ready", "deleted", "cleared")


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


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

    __table_args__ = (
        UniqueConstraint("api_key_id", "idempotency_key"),
        CheckConstraint(_one_of("status", JOB_STATUSES), name="status"),
        Index(None, "created_at", "id"),  # the list of jobs
        Index(None, "api_key_id", "created_at", "id"),  # the list of one owner's jobs
        Index(None, "status", "model"),  # the claim, the sweep of overdue jobs
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

    __table_args__ = (
        CheckConstraint(_one_of("status", REQUEST_STATUSES), name="status"),
        # The claim, and whether a job has anything left: both must not read the finished requests of a large job.
        Index(None, "job_id", "status", "request_index"),
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
    worker_id: Mapped[str]
    committed_at: Mapped[float]

    __table_args__ = (_of_a_request(),)


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
    worker_id: Mapped[str]
    started_at: Mapped[float]
    finished_at: Mapped[float]
    last_seq: Mapped[int]
    # A request may hold several prompts, each with several choices: its prompt tokens are those of these rows.
    first_of_prompt: Mapped[bool] = mapped_column(server_default=true())

    __table_args__ = (_of_a_request(),)


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
    decision: Mapped[str | None]  # tree, or why there was none (worker.engine.governor)

    __table_args__ = (
        _of_a_request(),
        CheckConstraint("accepted_tokens <= tree_nodes", name="accepted"),
        CheckConstraint("batch_sequences > 0", name="batch"),
    )


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
    stopped_at: Mapped[float | None]
    calibration: Mapped[dict[str, Any]]


@event.listens_for(Base.metadata, "after_create")
def _create_views(target: MetaData, connection: Connection, **_: object) -> None:
    drop_views(connection)
    create_views(connection)


@event.listens_for(Base.metadata, "before_drop")
def _drop_views(target: MetaData, connection: Connection, **_: object) -> None:
    drop_views(connection)
