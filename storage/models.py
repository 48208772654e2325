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
    false,
    text,
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


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


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
    # Version of its requests' bodies. A worker that reads only older ones leaves the job to those that were upgraded.
    body_version: Mapped[int] = mapped_column(server_default=text("1"))

    __table_args__ = (
        UniqueConstraint("api_key_id", "idempotency_key"),
        CheckConstraint(_one_of("status", JOB_STATUSES), name="status"),
        Index(None, "created_at", "id"),  # the list of jobs
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
    expires_at: Mapped[float | None]  # its own deadline; the job's holds too
    # Who ran it when a worker was lost (storage.reclaim): such a group runs again with nobody else in trial beside it.
    suspect_group: Mapped[str | None]
    proven: Mapped[bool] = mapped_column(server_default=false())  # has committed tokens under the present lease
    lone_crashes: Mapped[int] = mapped_column(server_default=text("0"))  # workers lost while it alone was in trial

    __table_args__ = (
        CheckConstraint(_one_of("status", REQUEST_STATUSES), name="status"),
        # The claim, and whether a job has anything left: both must not read the finished requests of a large job.
        Index(None, "job_id", "status", "request_index"),
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

    __table_args__ = (_of_a_request(),)


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
    stopped_at: Mapped[float | None]  # when it left in order
    calibration: Mapped[dict[str, Any]]
    process: Mapped[str | None]  # which process of this machine: its neighbours see at once if it is dead
    lost_at: Mapped[float | None]  # when it was found dead or silent; cleared should it come back


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
