"""The read side of the record: rows in, frozen values out.

jobs.api, jobs.partials, jobs.intake -> [queries] -> models.  Changes nothing. What is asked often (a job's state) is
one row; what may be large (its outputs) is streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, func, select, true, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage.flush import merge_pieces
from storage.models import DecodeStep, Job, Output, Partial, Request, Worker
from storage.sql import AnyRow, database_now, owned_by

_SEEN_S: Final = 60.0  # a worker that has not been heard of for longer serves nothing
_OUTPUTS_AT_ONCE: Final = 500
_ENDED: Final = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it stands."""

    id: str
    status: str
    model: str
    endpoint: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float
    cancelling_at: float | None
    requests_total: int
    requests_completed: int
    requests_failed: int
    prompt_tokens: int
    completion_tokens: int  # committed so far, unfinished requests included
    metadata: Mapping[str, str] | None
    api_key_id: str | None
    idempotency_key: str | None
    input_file_id: str | None  # none: not a batch
    completion_window: str | None
    validated_at: float | None
    finalizing_at: float | None
    output_file_id: str | None
    error_file_id: str | None
    errors: Sequence[Mapping[str, Any]] | None
    usage: Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of the list of jobs."""

    jobs: tuple[JobView, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class ChoiceView:
    """A finished choice."""

    choice_index: int
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    accepted_tokens: int
    worker_id: str
    started_at: float
    finished_at: float
    first_of_prompt: bool


@dataclass(frozen=True, slots=True)
class OutputView:
    """A request that has ended: its choices, or why there are none (or not all)."""

    custom_id: str
    request_index: int
    status: str
    error_code: str | None
    error_message: str | None
    error_param: str | None
    error_status_code: int | None
    choices: tuple[ChoiceView, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompts: each counts once, whatever the number of its choices."""
        return sum(choice.prompt_tokens for choice in self.choices if choice.first_of_prompt)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all its choices."""
        return sum(choice.completion_tokens for choice in self.choices)


@dataclass(frozen=True, slots=True)
class ChoiceSnapshot:
    """One choice as far as it is committed. A request that failed before its first token is told as its choice 0."""

    custom_id: str
    request_index: int
    choice_index: int
    text: str
    pieces: tuple[tuple[str, str], ...]  # the text by who chose it: (text, "draft" | "target")
    last_seq: int  # of its last event; -1: none
    tokens: int
    accepted: int
    finish_reason: str | None
    error: dict[str, Any] | None  # code, message, param


@dataclass(frozen=True, slots=True)
class DepthAcceptance:
    """How often draft tokens of one depth were accepted."""

    depth: int
    tried: int  # steps whose tree reached this depth
    accepted: int
    rate: float


@dataclass(frozen=True, slots=True)
class JobStats:
    """The numbers of a job, or of everything. None where nothing was measured. Steps are those of finished choices."""

    job_id: str | None  # none: everything
    requests_total: int
    requests_completed: int
    requests_failed: int
    prompt_tokens: int
    completion_tokens: int
    wall_s: float  # during which the job (any job) was being worked on
    tokens_per_s: float | None  # completion tokens per second of that
    steps: int  # step 0 is not counted, here and in the next three: it is the token from prefill
    mean_acceptance_length: float | None  # tokens emitted per step and sequence
    mean_accepted: float | None  # of them accepted from the draft
    mean_expected: float | None  # accepted tokens that the drafter expected
    speedup: float | None  # over plain decoding, where the two can be compared; as in the view `job_speedup`
    speedup_source: str | None
    acceptance_by_depth: tuple[DepthAcceptance, ...]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker, running or not."""

    id: str
    hostname: str
    pid: int
    target: str
    draft: str | None
    devices: list[str]
    context_tokens: int
    started_at: float
    last_seen_at: float
    stopped_at: float | None
    calibration: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model that workers serve right now."""

    target: str
    context_tokens: int  # that every one of them can hold


_JOB_COLUMNS: Final = (
    Job.id,
    Job.status,
    Job.model,
    Job.endpoint,
    Job.created_at,
    Job.started_at,
    Job.finished_at,
    Job.expires_at,
    Job.cancelling_at,
    Job.requests_total,
    Job.requests_completed,
    Job.requests_failed,
    Job.prompt_tokens,
    Job.completion_tokens,
    Job.metadata_.label("metadata_"),
    Job.api_key_id,
    Job.idempotency_key,
    Job.input_file_id,
    Job.completion_window,
    Job.validated_at,
    Job.finalizing_at,
    Job.output_file_id,
    Job.error_file_id,
    Job.errors,
    Job.usage,
)


def job(session: Session, job_id: str, owner: str | None = None) -> JobView | None:
    """Return a job, or None if there is none of this id (with an `owner`: none of theirs)."""
    row = session.execute(select(*_JOB_COLUMNS).where(Job.id == job_id, owned_by(Job.api_key_id, owner))).first()
    return None if row is None else _job_view(row)


def jobs(
    session: Session, limit: int, after: str | None = None, owner: str | None = None, *, batches_only: bool = False
) -> JobPage:
    """Return up to `limit` jobs, newest first, from behind the job `after`; nothing stands behind an unknown id."""
    query = select(*_JOB_COLUMNS).where(owned_by(Job.api_key_id, owner))
    if batches_only:
        query = query.where(Job.input_file_id.is_not(None))
    query = query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
    if after is not None:
        last = select(Job.created_at, Job.id).where(Job.id == after).scalar_subquery()
        query = query.where(tuple_(Job.created_at, Job.id) < last)
    rows = session.execute(query).all()
    return JobPage(tuple(_job_view(row) for row in rows[:limit]), has_more=len(rows) > limit)


def outputs(session: Session, job_id: str, after_index: int = -1) -> Iterator[OutputView]:
    """Yield the requests of a job that have ended, in its order, from behind `after_index`; never all in memory."""
    rows = session.execute(
        select(
            Request.custom_id,
            Request.request_index,
            Request.status,
            Request.error_code,
            Request.error_message,
            Request.error_param,
            Request.error_status_code,
            Output.choice_index,
            Output.text,
            Output.finish_reason,
            Output.prompt_tokens,
            Output.completion_tokens,
            Output.accepted_tokens,
            Output.worker_id,
            Output.started_at,
            Output.finished_at,
            Output.first_of_prompt,
        )
        .outerjoin(Output, and_(Output.job_id == Request.job_id, Output.request_index == Request.request_index))
        .where(Request.job_id == job_id, Request.request_index > after_index, Request.status.in_(_ENDED))
        .where(_is_read(job_id))
        .order_by(Request.request_index, Output.choice_index)
        .execution_options(yield_per=_OUTPUTS_AT_ONCE)
    )
    for _, group in groupby(rows, key=lambda row: row.request_index):
        yield _output_view(list(group))


def snapshot(session: Session, job_id: str) -> list[ChoiceSnapshot]:
    """Return every choice of a job of which something is committed, in order."""
    errors = _errors(session, job_id)
    found = {
        **{(index, 0): _failed_choice(index, 0, error) for index, error in errors.items()},
        **_written_choices(session, job_id, errors),
        **_finished_choices(session, job_id),
    }
    return [found[key] for key in sorted(found)]


def job_stats(session: Session, job_id: str) -> JobStats:
    """Return the numbers of one job."""
    return _stats(session, job_id)


def total_stats(session: Session) -> JobStats:
    """Return the numbers of all jobs together."""
    return _stats(session, None)


def workers(session: Session) -> list[WorkerView]:
    """Return the workers that have introduced themselves, latest start first."""
    columns = [getattr(Worker, name) for name in WorkerView.__dataclass_fields__]
    rows = session.execute(select(*columns).order_by(Worker.started_at.desc(), Worker.id))
    return [WorkerView(*row) for row in rows]


def models(session: Session) -> list[ModelView]:
    """Return the models of the workers that are alive."""
    alive = and_(Worker.stopped_at.is_(None), Worker.last_seen_at > database_now(session) - _SEEN_S)
    rows = session.execute(
        select(Worker.target, func.min(Worker.context_tokens))
        .where(alive)
        .group_by(Worker.target)
        .order_by(Worker.target)
    )
    return [ModelView(target, context_tokens) for target, context_tokens in rows]


def _job_view(row: AnyRow) -> JobView:
    values = dict(row._mapping)
    values["metadata"] = values.pop("metadata_")
    values["api_key_id"] = values["api_key_id"] or None
    return JobView(**values)


def _output_view(rows: list[AnyRow]) -> OutputView:
    """Return a request from its rows: one per choice, or a single one without."""
    request = rows[0]
    return OutputView(
        custom_id=request.custom_id,
        request_index=request.request_index,
        status=request.status,
        error_code=request.error_code,
        error_message=request.error_message,
        error_param=request.error_param,
        error_status_code=request.error_status_code,
        choices=tuple(_choice_view(row) for row in rows if row.choice_index is not None),
    )


def _choice_view(row: AnyRow) -> ChoiceView:
    return ChoiceView(**{name: getattr(row, name) for name in ChoiceView.__dataclass_fields__})


def _is_read(job_id: str) -> ColumnElement[bool]:
    """Return the condition that all requests of a job are there: they appear at once, though written in pieces."""
    return select(Job.validated_at).where(Job.id == job_id).scalar_subquery().is_not(None)


def _errors(session: Session, job_id: str) -> dict[int, AnyRow]:
    """Return the requests of a job that ended without a result."""
    rows = session.execute(
        select(
            Request.request_index,
            Request.custom_id,
            Request.error_code,
            Request.error_message,
            Request.error_param,
        )
        .where(Request.job_id == job_id, Request.status.in_(("failed", "expired", "cancelled")))
        .where(_is_read(job_id))
    )
    return {row.request_index: row for row in rows}


def _failed_choice(index: int, choice: int, error: AnyRow) -> ChoiceSnapshot:
    return ChoiceSnapshot(error.custom_id, index, choice, "", (), -1, 0, 0, None, _error_body(error))


def _error_body(error: AnyRow | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"code": error.error_code, "message": error.error_message, "param": error.error_param}


def _written_choices(
    session: Session, job_id: str, errors: Mapping[int, AnyRow]
) -> dict[tuple[int, int], ChoiceSnapshot]:
    """Return the choices that have checkpoints and no output yet."""
    rows = session.execute(
        select(
            Request.custom_id,
            Partial.request_index,
            Partial.choice_index,
            Partial.seq,
            Partial.text,
            Partial.pieces,
            Partial.accepted,
        )
        .join(Request, and_(Request.job_id == Partial.job_id, Request.request_index == Partial.request_index))
        .where(Partial.job_id == job_id)
        .order_by(Partial.request_index, Partial.choice_index, Partial.seq)
    )
    return {
        key: _written_choice(list(group), _error_body(errors.get(key[0])))
        for key, group in groupby(rows, key=lambda row: (row.request_index, row.choice_index))
    }


def _written_choice(partials: list[AnyRow], error: dict[str, Any] | None) -> ChoiceSnapshot:
    last = partials[-1]
    flags = [flag for partial in partials for flag in partial.accepted]
    return ChoiceSnapshot(
        custom_id=last.custom_id,
        request_index=last.request_index,
        choice_index=last.choice_index,
        text="".join(partial.text for partial in partials),
        pieces=tuple(merge_pieces(piece for partial in partials for piece in partial.pieces)),
        last_seq=last.seq,
        tokens=len(flags),
        accepted=sum(flags),
        finish_reason=None,
        error=error,
    )


def _finished_choices(session: Session, job_id: str) -> dict[tuple[int, int], ChoiceSnapshot]:
    rows = session.execute(
        select(
            Request.custom_id,
            Output.request_index,
            Output.choice_index,
            Output.text,
            Output.pieces,
            Output.last_seq,
            Output.completion_tokens,
            Output.accepted_tokens,
            Output.finish_reason,
        )
        .join(Request, and_(Request.job_id == Output.job_id, Request.request_index == Output.request_index))
        .where(Output.job_id == job_id)
    )
    return {
        (row.request_index, row.choice_index): ChoiceSnapshot(
            custom_id=row.custom_id,
            request_index=row.request_index,
            choice_index=row.choice_index,
            text=row.text,
            pieces=tuple((text, source) for text, source in row.pieces),
            last_seq=row.last_seq,
            tokens=row.completion_tokens,
            accepted=row.accepted_tokens,
            finish_reason=row.finish_reason,
            error=None,
        )
        for row in rows
    }


def _stats(session: Session, job_id: str | None) -> JobStats:
    counts = _counts(session, job_id)
    steps = _step_numbers(session, job_id)
    wall_s = _wall_s(session, job_id)
    return JobStats(
        job_id=job_id,
        **counts,
        wall_s=wall_s,
        tokens_per_s=counts["completion_tokens"] / wall_s if wall_s > 0 else None,
        steps=steps.steps,
        mean_acceptance_length=_mean(steps.mean_emitted),
        mean_accepted=_mean(steps.mean_accepted),
        mean_expected=_mean(steps.mean_expected),
        speedup=steps.plain_ms / steps.spent_ms if steps.spent_ms else None,
        speedup_source="calibration" if steps.spent_ms else None,
        acceptance_by_depth=_acceptance_by_depth(session, job_id),
    )


def _mean(value: Any) -> float | None:
    """Return a mean as a float: of integers, PostgreSQL makes decimals."""
    return None if value is None else float(value)


def _counts(session: Session, job_id: str | None) -> dict[str, int]:
    names = ("requests_total", "requests_completed", "requests_failed", "prompt_tokens", "completion_tokens")
    sums = [func.coalesce(func.sum(getattr(Job, name)), 0) for name in names]
    row = session.execute(select(*sums).where(_of_job(Job.id, job_id))).one()
    return {name: int(value) for name, value in zip(names, row, strict=True)}


def _wall_s(session: Session, job_id: str | None) -> float:
    """Return the seconds in which at least one of the jobs was being worked on."""
    end = func.coalesce(Job.finished_at, database_now(session))
    begin = func.coalesce(Job.started_at, end)  # a job that was never started takes no time
    spans = session.execute(select(begin, end).where(_of_job(Job.id, job_id)).order_by(begin))
    total_s, busy_until = 0.0, float("-inf")
    for began_at, ended_at in spans:
        total_s += max(0.0, ended_at - max(began_at, busy_until))
        busy_until = max(busy_until, ended_at)
    return total_s


def _step_numbers(session: Session, job_id: str | None) -> AnyRow:
    decoded = DecodeStep.step > 0
    comparable = DecodeStep.plain_step_ms.is_not(None)
    plain_ms = DecodeStep.emitted_tokens * DecodeStep.plain_step_ms / DecodeStep.batch_sequences
    return session.execute(
        select(
            func.count().filter(decoded).label("steps"),
            func.avg(DecodeStep.emitted_tokens).filter(decoded).label("mean_emitted"),
            func.avg(DecodeStep.accepted_tokens).filter(decoded).label("mean_accepted"),
            func.avg(DecodeStep.expected_accepted).filter(decoded).label("mean_expected"),
            func.sum(DecodeStep.step_ms / DecodeStep.batch_sequences).filter(comparable).label("spent_ms"),
            func.sum(plain_ms).filter(comparable).label("plain_ms"),
        ).where(_of_job(DecodeStep.job_id, job_id))
    ).one()


def _acceptance_by_depth(session: Session, job_id: str | None) -> tuple[DepthAcceptance, ...]:
    """Return what the view of this name says; asked so that only the rows of one job are read."""
    rows = session.execute(
        select(DecodeStep.tree_depth, DecodeStep.accepted_tokens, func.count())
        .where(DecodeStep.tree_depth >= 1, _of_job(DecodeStep.job_id, job_id))
        .group_by(DecodeStep.tree_depth, DecodeStep.accepted_tokens)
    ).all()
    return tuple(_at_depth(depth, rows) for depth in range(1, max((row[0] for row in rows), default=0) + 1))


def _at_depth(depth: int, rows: Sequence[AnyRow]) -> DepthAcceptance:
    tried = sum(steps for tree_depth, _, steps in rows if tree_depth >= depth)
    accepted = sum(steps for _, accepted_tokens, steps in rows if accepted_tokens >= depth)
    return DepthAcceptance(depth, tried, accepted, accepted / tried)


def _of_job(column: ColumnElement[str] | InstrumentedAttribute[str], job_id: str | None) -> ColumnElement[bool]:
    return true() if job_id is None else column == job_id
