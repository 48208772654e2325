"""Read queries, as frozen values. A job's state is its row; outputs, which can be large, are streamed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, Text, and_, bindparam, case, cast, func, select, true, tuple_
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, clock, dialect_of
from storage.job_filter import JobFilter
from storage.models import ChoiceOutput, JobRow, Request, Worker
from storage.numerics import joined
from storage.pausing import shown_status
from storage.records import HEARTBEAT_TIMEOUT_S, NewRequest
from storage.statistics import DepthAcceptance as DepthAcceptance  # re-exported
from storage.statistics import JobStats as JobStats
from storage.statistics import job_stats as job_stats
from storage.statistics import total_stats as total_stats
from storage.statuses import ACTIVE_JOB_STATUSES, ERROR_REQUEST_STATUSES, FINAL_REQUEST_STATUSES

_ALL_JOBS: Final = JobFilter()
_OUTPUTS_PER_FETCH: Final = 500
_REQUESTS_PER_PAGE: Final = 50  # few, because each body can be as large as BASIC_MAX_LINE_BYTES


@dataclass(frozen=True, slots=True)
class JobView:
    """The state of a job, from its row and its first request."""

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
    completion_tokens: int  # committed so far, open requests included
    metadata: Mapping[str, str] | None
    api_key_id: str | None
    idempotency_key: str | None
    input_file_id: str | None  # None: not a batch
    completion_window: str | None
    validated_at: float | None
    finalizing_at: float | None
    output_file_id: str | None
    error_file_id: str | None
    errors: Sequence[Mapping[str, Any]] | None
    usage: Mapping[str, int] | None
    retry_of: str | None
    name: str | None
    paused_at: float | None  # also while it is validating
    pause_reason: str | None  # storage.pausing.BY_USER, or why the service paused it
    priority_class: int  # storage.priorities.Priority.rank
    max_concurrent: int | None
    prompts_deleted_at: float | None  # because of their age
    outputs_deleted_at: float | None
    budget_tokens: int | None
    budget_s: float | None
    paused_s: float  # of pauses that are over
    verification_of: str | None  # job of which it computes a sample again, without drafts
    # Of its requests and tokens: those that were copied from earlier answers (storage.cached_answers).
    requests_cached: int
    cached_prompt_tokens: int
    cached_completion_tokens: int
    # Sampling parameters that the model's generation config gave to its first request; not in lists.
    sampling_defaults: Mapping[str, Any] | None = None

    @property
    def computed_completion_tokens(self) -> int:
        """Completion tokens that a worker has decoded for this job: those that its speed counts."""
        return self.completion_tokens - self.cached_completion_tokens


@dataclass(frozen=True, slots=True)
class JobViewPage:
    """A page of the list of jobs; `has_more`: jobs follow it."""

    jobs: tuple[JobView, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class ChoiceView:
    """A finished choice: text, tokens and why it ended."""

    choice_index: int
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    accepted_tokens: int
    worker_id: str
    started_at: float
    finished_at: float
    logprobs: list[Any] | None  # per token, if requested
    first_of_prompt: bool
    reasoning_tokens: int | None = None  # None: the model marks no reasoning
    prompt: Mapping[str, Any] | None = None  # what the answer returns of its prompt
    token_ids: list[int] | None = None  # where it returns anything of its prompt
    numerics: str | None = None  # what fixed its bits (storage.numerics)
    cached_from: str | None = None  # the answer that it is a copy of: job id/request index


@dataclass(frozen=True, slots=True)
class OutputView:
    """A request that has ended: its choices, or its error."""

    custom_id: str
    request_index: int
    status: str
    error_code: str | None
    error_message: str | None
    error_param: str | None
    error_status_code: int | None
    choices: tuple[ChoiceView, ...]
    answer_format: Mapping[str, Any] | None = None  # jobs.messages.AnswerFormat; None: the text is the content
    sampling_defaults: Mapping[str, Any] | None = None  # sampling parameters of the model's generation config
    keep: Mapping[str, Any] | None = None  # values of the caller (GenerationRequest.keep)
    body: Mapping[str, Any] | None = None  # the request, if it was asked for

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens; each prompt counts once, for all its choices."""
        return sum(choice.prompt_tokens for choice in self.choices if choice.first_of_prompt)

    @property
    def numerics(self) -> str | None:
        """Fingerprints of the numerics that its choices were computed with (see `ChoiceView.numerics`)."""
        return joined(choice.numerics for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        """Completion tokens of all choices."""
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Prompt and completion tokens of copied answers; 0: they were computed."""
        copied = [choice for choice in self.choices if choice.cached_from is not None]
        prompts = sum(choice.prompt_tokens for choice in copied if choice.first_of_prompt)
        return prompts + sum(choice.completion_tokens for choice in copied)

    @property
    def reasoning_tokens(self) -> int | None:
        """Completion tokens that are reasoning, of all choices; None if the model marks no reasoning."""
        counts = [choice.reasoning_tokens for choice in self.choices if choice.reasoning_tokens is not None]
        return sum(counts) if counts else None


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request of a job, in any state."""

    body: Mapping[str, Any] | None  # None: rejected at submission
    status: str
    finished_at: float | None
    output: OutputView | None  # once it has ended


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker, running or stopped."""

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
    load: Mapping[str, Any] | None  # last reported load
    lost_at: float | None  # found dead or silent
    numerics: str | None = None  # fingerprint of what fixes the bits of its texts (storage.numerics)


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model that live workers serve."""

    target: str
    context_tokens: int  # minimum over these workers


# Runs with every request about a job. Built once, from table columns: building it costs more than running it.
_JOBS: Final = JobRow.__table__.c
_JOB_COLUMNS: Final = tuple(
    shown_status(_JOBS).label("status") if field.name == "status" else _JOBS[field.name]
    for field in fields(JobView)
    if field.name != "sampling_defaults"
)
_REQUESTS: Final = Request.__table__.c
_FIRST_REQUEST: Final = and_(_REQUESTS.job_id == _JOBS.id, _REQUESTS.request_index == 0)
_JOB_QUERY: Final = select(
    *_JOB_COLUMNS,
    select(_REQUESTS.sampling_defaults).where(_FIRST_REQUEST).scalar_subquery().label("sampling_defaults"),
).where(_JOBS.id == bindparam("job_id"), _JOBS.erased_at.is_(None))
_OWNED_JOB_QUERY: Final = _JOB_QUERY.where(_JOBS.api_key_id == bindparam("owner"))


def job(session: Session | Connection, job_id: str, owner: str | None = None) -> JobView | None:
    """Return a job; None if it does not exist or belongs to another owner."""
    row = session.execute(_JOB_QUERY if owner is None else _OWNED_JOB_QUERY, {"job_id": job_id, "owner": owner}).first()
    return None if row is None else _job_view(row)


def jobs(
    session: Session,
    limit: int,
    after: str | None = None,
    wanted: JobFilter = _ALL_JOBS,
    *,
    newest_first: bool = True,
) -> JobViewPage:
    """Return up to `limit` jobs by creation time, starting after the job `after`; an unknown `after` returns none.

    Verifications are not listed, unless `wanted` asks for those of a job.
    """
    query = select(*_JOB_COLUMNS).where(*wanted.conditions(session), JobRow.erased_at.is_(None))
    columns = (JobRow.created_at, JobRow.id)
    query = query.order_by(*(c.desc() if newest_first else c.asc() for c in columns)).limit(limit + 1)
    if after is not None:
        last = select(JobRow.created_at, JobRow.id).where(JobRow.id == after).scalar_subquery()
        query = query.where(tuple_(*columns) < last if newest_first else tuple_(*columns) > last)
    rows = session.execute(query).all()
    return JobViewPage(tuple(_job_view(row) for row in rows[:limit]), has_more=len(rows) > limit)


def outputs(
    session: Session,
    job_id: str,
    after_index: int = -1,
    *,
    without_result: bool = False,
    among: Collection[int] | None = None,
    with_body: bool = False,
) -> Iterator[OutputView]:
    """Stream the ended requests of a job with an index above `after_index`, in order.

    `without_result` selects those that ended with an error; `among` restricts the result to these indexes. `with_body`
    reads the requests too.
    """
    statuses = ERROR_REQUEST_STATUSES if without_result else FINAL_REQUEST_STATUSES
    wanted = true() if among is None else Request.request_index.in_(among)
    rows = session.execute(
        select(
            Request.custom_id,
            Request.request_index,
            Request.status,
            Request.error_code,
            Request.error_message,
            Request.error_param,
            Request.error_status_code,
            Request.answer_format,
            Request.sampling_defaults,
            Request.body["keep"].label("keep"),
            *([Request.body] if with_body else []),
            ChoiceOutput.choice_index,
            ChoiceOutput.text,
            ChoiceOutput.finish_reason,
            ChoiceOutput.prompt_tokens,
            ChoiceOutput.completion_tokens,
            ChoiceOutput.accepted_tokens,
            ChoiceOutput.worker_id,
            ChoiceOutput.started_at,
            ChoiceOutput.finished_at,
            ChoiceOutput.logprobs,
            ChoiceOutput.first_of_prompt,
            ChoiceOutput.reasoning_tokens,
            ChoiceOutput.prompt,
            case((ChoiceOutput.prompt.is_not(None), ChoiceOutput.token_ids)).label("token_ids"),
            ChoiceOutput.numerics,
            ChoiceOutput.cached_from,
        )
        .outerjoin(
            ChoiceOutput,
            and_(ChoiceOutput.job_id == Request.job_id, ChoiceOutput.request_index == Request.request_index),
        )
        .where(Request.job_id == job_id, Request.request_index > after_index, Request.status.in_(statuses), wanted)
        .where(_is_validated(job_id))
        .order_by(Request.request_index, ChoiceOutput.choice_index)
        .execution_options(yield_per=_OUTPUTS_PER_FETCH)
    )
    for _, group in groupby(rows, key=lambda row: row.request_index):
        yield _output_view(list(group))


def request(session: Session, job_id: str, index: int) -> RequestView | None:
    """Return one request of a job; None if the job has none with this index."""
    found = select(Request.body, Request.status, Request.finished_at)
    row = session.execute(
        found.where(Request.job_id == job_id, Request.request_index == index, _is_validated(job_id))
    ).first()
    if row is None:
        return None
    output = next(outputs(session, job_id, index - 1, among=(index,)), None)
    status = row.status if output is None else output.status  # it may have ended between the two reads
    return RequestView(row.body, status, row.finished_at, output)


def request_bodies(session: Session, job_id: str, indexes: Collection[int]) -> dict[int, Mapping[str, Any] | None]:
    """Return the bodies of these requests of a job, by index."""
    which = (Request.job_id == job_id, Request.request_index.in_(indexes))
    rows = session.execute(select(Request.request_index, Request.body).where(*which))
    return {row.request_index: row.body for row in rows}


def requests_to_retry(session: Session, job_id: str) -> Iterator[NewRequest]:
    """Yield the requests of a job that ended with an error and can run again, in order."""
    after = -1
    while True:
        rows = session.execute(
            select(
                Request.request_index,
                Request.custom_id,
                Request.body,
                Request.identity,
                func.length(cast(Request.body, Text)).label("size_bytes"),
            )
            .where(
                Request.job_id == job_id,
                Request.request_index > after,
                Request.status.in_(ERROR_REQUEST_STATUSES),
                Request.body.is_not(None),  # NULL: rejected at submission, and would be again
            )
            .order_by(Request.request_index)
            .limit(_REQUESTS_PER_PAGE)
        ).all()
        for row in rows:
            yield NewRequest(row.custom_id, body=row.body, size_bytes=row.size_bytes, identity=row.identity)
        if len(rows) < _REQUESTS_PER_PAGE:
            return
        after = rows[-1].request_index


def open_requests(session: Session) -> int:
    """Return the number of queued and running requests of all jobs."""
    left = JobRow.requests_total - JobRow.requests_completed - JobRow.requests_failed
    return int(
        session.scalar(select(func.coalesce(func.sum(left), 0)).where(JobRow.status.in_(ACTIVE_JOB_STATUSES))) or 0
    )


def workers(session: Session, within_s: float | None = None) -> list[WorkerView]:
    """Return the registered workers, latest start first: all, or those that run and were seen in `within_s` seconds."""
    columns = [getattr(Worker, name) for name in WorkerView.__dataclass_fields__]
    query = select(*columns).order_by(Worker.started_at.desc(), Worker.id)
    if within_s is not None:
        query = query.where(_is_alive(dialect_of(session), within_s))
    return [WorkerView(*row) for row in session.execute(query)]


def live_workers_of(session: Session, model: str) -> list[WorkerView]:
    """Return the live workers that serve a model, latest start first."""
    alive = and_(Worker.target == model, _is_alive(dialect_of(session), HEARTBEAT_TIMEOUT_S))
    columns = [getattr(Worker, name) for name in WorkerView.__dataclass_fields__]
    rows = session.execute(select(*columns).where(alive).order_by(Worker.started_at.desc(), Worker.id))
    return [WorkerView(*row) for row in rows]


def models(session: Session | Connection) -> list[ModelView]:
    """Return the models of live workers."""
    rows = session.execute(_models_query(dialect_of(session)))
    return [ModelView(target, context_tokens) for target, context_tokens in rows]


@cache
def _models_query(dialect: str) -> Select[Any]:
    """Return the query of the served models. Cached, because it runs with every submission."""
    workers = Worker.__table__.c
    return (
        select(workers.target, func.min(workers.context_tokens))
        .where(_is_alive(dialect, HEARTBEAT_TIMEOUT_S))
        .group_by(workers.target)
        .order_by(workers.target)
    )


def _is_alive(dialect: str, within_s: float) -> ColumnElement[bool]:
    workers = Worker.__table__.c
    seen = workers.last_seen_at > clock(dialect) - within_s
    return and_(workers.stopped_at.is_(None), workers.lost_at.is_(None), seen)


def _job_view(row: AnyRow) -> JobView:
    values = dict(row._mapping)
    values["api_key_id"] = values["api_key_id"] or None
    return JobView(**values)


def _output_view(rows: list[AnyRow]) -> OutputView:
    """Return a request from the rows of its join with `outputs`: one per choice; one with NULLs if it has no choice."""
    request = rows[0]
    choices = tuple(_choice_views(row for row in rows if row.choice_index is not None))
    is_deleted = request.status == "completed" and not choices
    return OutputView(
        custom_id=request.custom_id,
        request_index=request.request_index,
        status=request.status,
        error_code="output_deleted" if is_deleted else request.error_code,
        error_message=_OUTPUT_DELETED if is_deleted else request.error_message,
        error_param=request.error_param,
        error_status_code=410 if is_deleted else request.error_status_code,
        choices=choices,
        answer_format=request.answer_format,
        sampling_defaults=request.sampling_defaults,
        keep=request.keep,
        body=getattr(request, "body", None),
    )


_OUTPUT_DELETED: Final = "The output was deleted because of its age."


def _choice_views(rows: Iterable[AnyRow]) -> Iterator[ChoiceView]:
    prompt = None
    for row in rows:
        columns = {name: getattr(row, name) for name in ChoiceView.__dataclass_fields__}
        prompt = columns["prompt"] if columns["first_of_prompt"] else prompt
        yield ChoiceView(**columns | {"prompt": prompt})


def _is_validated(job_id: str) -> ColumnElement[bool]:
    """Return the condition that a batch is validated: its requests, stored in chunks, become visible together."""
    return select(JobRow.validated_at).where(JobRow.id == job_id).scalar_subquery().is_not(None)
