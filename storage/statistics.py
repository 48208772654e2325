"""Statistics of jobs: throughput, acceptance and speed-up, as frozen values. storage.views has the same in SQL.

Reads the sums of storage.rollups, so that a query takes milliseconds for any number of steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, case, func, select, true
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage.dialect import AnyRow, database_now
from storage.models import (
    CheckedRequest,
    JobRow,
    PackedSteps,
    StepBatchSize,
    StepDepth,
    StepExpectation,
    StepMinute,
    StepRank,
    WorkerEnergy,
)
from storage.pausing import shown_status
from storage.statuses import UNSUCCESSFUL_JOB_STATUSES
from storage.steps.columns import MS_UNITS
from storage.steps.packing import unpack, unpack_optional

PLAIN_DECISIONS: Final = ("probe", "guard", "off")  # of plain steps without a draft lookup
_MINUTE_S: Final = 60
_MIN_BLOCKS: Final = 8  # with fewer minutes, the standard error is taken over requests
_MAX_STEPS_BY_REQUEST: Final = 100_000  # with more steps, reading them by request takes too long


@dataclass(frozen=True, slots=True)
class DepthAcceptance:
    """Acceptance of draft tokens at one depth of the tree."""

    depth: int
    tried: int  # steps whose tree reached this depth
    accepted: int
    rate: float


@dataclass(frozen=True, slots=True)
class RankAcceptance:
    """Acceptance of draft children of one rank."""

    child_rank: int  # 0: highest draft probability
    tried: int
    accepted: int
    rate: float


@dataclass(frozen=True, slots=True)
class AcceptanceCount:
    """Number of steps that accepted this many draft tokens."""

    accepted_tokens: int
    steps: int


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Means over the steps of one batch size."""

    batch_sequences: int
    steps: int
    mean_tree_nodes: float
    share_with_tree: float
    mean_emitted_per_step: float
    mean_step_ms: float


@dataclass(frozen=True, slots=True)
class DrafterShare:
    """Means over the steps of one drafter; '': steps without drafts."""

    drafter: str
    steps: int
    mean_tree_nodes: float
    mean_accepted: float
    speedup: float | None


@dataclass(frozen=True, slots=True)
class DecisionShare:
    """Share and speed-up of the steps of one decision; '': not recorded."""

    decision: str
    steps: int
    share: float
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Expectation:
    """Expected and actual acceptance of the steps in one bin of expected acceptance."""

    steps: int
    mean_expected: float
    mean_accepted: float


@dataclass(frozen=True, slots=True)
class Minute:
    """Tokens and steps of one minute."""

    minute: int  # start, Unix seconds
    tokens: int
    busy_s: float  # seconds of it in which the job (any job) was running
    mean_acceptance_length: float | None
    speedup: float | None


@dataclass(frozen=True, slots=True)
class SpeedupCheckStats:
    """Result of a job's speed-up check (storage.speedup_checks)."""

    requests_asked: int
    requests: int  # decoded with and without drafts; requests without an output are left out
    done: bool  # False: waits for an idle worker. Only completed jobs are checked
    speedup: float | None  # time without drafts over time with drafts, in interleaved steps
    speedup_error: float | None  # standard error, over requests
    mean_batch_sequences: float | None
    faults: int  # requests whose texts differ; must be 0
    error_code: str | None = None  # why the check failed
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class JobStats:
    """Statistics of a job, or of all jobs. None: not measured. Steps are those of finished choices."""

    job_id: str | None  # None: all jobs
    requests_total: int
    requests_completed: int
    requests_failed: int
    prompt_tokens: int
    completion_tokens: int
    # Of these: copied from earlier answers (storage.cached_answers). They count in no speed.
    requests_cached: int
    cached_prompt_tokens: int
    cached_completion_tokens: int
    wall_s: float  # during which the job (any job) was running
    tokens_per_s: float | None  # completion tokens that were computed, over wall_s
    steps: int  # without step 0, the token from prefill; so are the next three
    mean_acceptance_length: float | None  # tokens emitted per step and sequence
    mean_accepted: float | None  # accepted draft tokens per step and sequence
    mean_expected: float | None  # the drafter's estimate of mean_accepted
    speedup: float | None  # over plain decoding, of comparable steps; as in the view `job_speedup`
    speedup_error: float | None  # standard error, over minutes (short jobs: over requests)
    speedup_source: str | None
    plain_steps: int  # steps that were plain by decision (PLAIN_DECISIONS)
    plain_check: float | None  # their measured over their estimated time; 1: the estimate in `speedup` is exact
    miscalibration: float | None  # |mean expected - mean accepted| / mean accepted, of steps with a tree
    mean_tree_nodes: float | None
    draft_share: float | None  # of the step time; what draft and verify leave is host time
    verify_share: float | None
    tokens_per_joule: float | None  # only over all jobs, where NVML reports energy
    acceptance_by_depth: tuple[DepthAcceptance, ...]
    acceptance_by_rank: tuple[RankAcceptance, ...] = ()
    acceptance: tuple[AcceptanceCount, ...] = ()
    batch_sizes: tuple[BatchSize, ...] = ()
    drafters: tuple[DrafterShare, ...] = ()
    decisions: tuple[DecisionShare, ...] = ()
    reliability: tuple[Expectation, ...] = ()
    minutes: tuple[Minute, ...] = ()
    comparison: SpeedupCheckStats | None = None  # of one job with a speed-up check


def job_stats(session: Session, job_id: str) -> JobStats:
    """Return the statistics of one job, its speed-up check included."""
    return _stats(session, _Scope(job_id))


def total_stats(session: Session, owner: str | None = None) -> JobStats:
    """Return the statistics of all jobs together, or of one owner's."""
    return _stats(session, _Scope(owner=owner))


@dataclass(frozen=True, slots=True)
class _Scope:
    """One job, the jobs of one owner, or all jobs."""

    job_id: str | None = None
    owner: str | None = None

    def contains(self, column: ColumnElement[str] | InstrumentedAttribute[str]) -> ColumnElement[bool]:
        """Return the condition that a job id is in scope."""
        if self.job_id is not None:
            return column == self.job_id
        if self.owner is not None:
            return column.in_(select(JobRow.id).where(JobRow.api_key_id == self.owner))
        return true()


def _stats(session: Session, scope: _Scope) -> JobStats:
    counts = _counts(session, scope)
    spans = _spans(session, scope)
    wall_s = sum(end - begin for begin, end in spans)
    sums = _sums(session, scope)
    with_tree = _expectations(session, scope)
    speedup = _ratio(sums.plain_ms, sums.compared_ms)
    return JobStats(
        job_id=scope.job_id,
        **counts,
        wall_s=wall_s,
        tokens_per_s=_ratio(counts["completion_tokens"] - counts["cached_completion_tokens"], wall_s),
        steps=int(sums.steps),
        mean_acceptance_length=_ratio(sums.tokens, sums.steps),
        mean_accepted=_ratio(sums.accepted_tokens, sums.steps),
        mean_expected=_ratio(sums.expected_accepted, sums.steps),
        speedup=speedup,
        speedup_error=None if speedup is None else _error(session, scope, int(sums.compared_steps)),
        speedup_source=None if speedup is None else "calibration",
        plain_steps=int(sums.plain_steps),
        plain_check=_ratio(sums.plain_spent_ms, sums.plain_expected_ms),
        miscalibration=_miscalibration(with_tree),
        mean_tree_nodes=_ratio(sums.tree_nodes, sums.steps),
        draft_share=_ratio(sums.draft_ms, sums.step_ms),
        verify_share=_ratio(sums.verify_ms, sums.step_ms),
        tokens_per_joule=_tokens_per_joule(session) if scope == _Scope() else None,
        acceptance_by_depth=_by_depth(session, scope),
        acceptance_by_rank=_by_rank(session, scope),
        acceptance=_histogram(session, scope),
        batch_sizes=_batch_sizes(session, scope),
        drafters=_drafters(session, scope),
        decisions=_decisions(session, scope),
        reliability=tuple(with_tree),
        minutes=_minutes(session, scope, spans),
        comparison=None if scope.job_id is None else _comparison(session, scope.job_id),
    )


def _ratio(part: Any, whole: Any) -> float | None:
    """Return part / whole as a float; None if a part is missing or the whole is 0. Takes Decimal, too."""
    return float(part) / float(whole) if part is not None and whole else None


def _counts(session: Session, scope: _Scope) -> dict[str, int]:
    names = (
        *("requests_total", "requests_completed", "requests_failed", "prompt_tokens", "completion_tokens"),
        *("requests_cached", "cached_prompt_tokens", "cached_completion_tokens"),
    )
    sums = [func.coalesce(func.sum(getattr(JobRow, name)), 0) for name in names]
    row = session.execute(select(*sums).where(scope.contains(JobRow.id))).one()
    return {name: int(value) for name, value in zip(names, row, strict=True)}


_Spans = Sequence[tuple[float, float]]


def _spans(session: Session, scope: _Scope) -> _Spans:
    """Return the disjoint intervals, in order, in which at least one of the jobs was running (Unix seconds)."""
    end = func.coalesce(JobRow.finished_at, database_now(session))
    begin = func.coalesce(JobRow.started_at, end)  # a job that never started has an empty interval
    spans: list[tuple[float, float]] = []
    for began_at, ended_at in session.execute(select(begin, end).where(scope.contains(JobRow.id)).order_by(begin)):
        if spans and began_at <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], ended_at))
        elif ended_at > began_at:
            spans.append((began_at, ended_at))
    return spans


_SUMMED: Final = (
    "steps",
    "tokens",
    "tree_nodes",
    "accepted_tokens",
    "expected_accepted",
    "draft_ms",
    "verify_ms",
    "step_ms",
    "compared_steps",
    "compared_ms",
    "plain_ms",
)


def _sums(session: Session, scope: _Scope) -> AnyRow:
    return session.execute(select(*_sum_columns()).where(scope.contains(StepMinute.job_id))).one()


def _sum_columns() -> list[ColumnElement[Any]]:
    plain = StepMinute.decision.in_(PLAIN_DECISIONS)
    columns: list[ColumnElement[Any]] = [_total(getattr(StepMinute, name)).label(name) for name in _SUMMED]
    columns += [
        _total(case((plain, StepMinute.compared_steps), else_=0)).label("plain_steps"),
        _total(case((plain, StepMinute.compared_ms), else_=0)).label("plain_spent_ms"),
        _total(case((plain, StepMinute.plain_ms), else_=0)).label("plain_expected_ms"),
    ]
    return columns


def _total(value: ColumnElement[Any] | InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(value), 0)


def _error(session: Session, scope: _Scope, steps: int) -> float | None:
    """Return the standard error of the speed-up over minutes; of a short job, over requests."""
    by_minute = (
        select(func.sum(StepMinute.plain_ms), func.sum(StepMinute.compared_ms))
        .where(scope.contains(StepMinute.job_id))
        .group_by(StepMinute.minute)
    )
    blocks = [(float(plain), float(spent)) for plain, spent in session.execute(by_minute)]
    if len(blocks) < _MIN_BLOCKS and steps <= _MAX_STEPS_BY_REQUEST:
        blocks = _by_choice(session, scope)
    return ratio_error([(plain, spent) for plain, spent in blocks if spent])


def _by_choice(session: Session, scope: _Scope) -> list[tuple[float, float]]:
    """Return the plain and the measured time of each choice, of its comparable steps: shares, as in `step_minutes`.

    Reads the packed columns: the view `decode_steps` takes ten times as long.
    """
    sums: defaultdict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    comparable = PackedSteps.min_plain_step_ms.is_not(None)
    for row in session.execute(select(*_COMPARED).where(scope.contains(PackedSteps.job_id), comparable)):
        choice = sums[row.job_id, row.request_index, row.choice_index]
        columns = (
            unpack(row.min_emitted_tokens, row.emitted_tokens, row.steps),
            unpack_optional(row.min_plain_step_ms, row.plain_step_ms, row.steps),
            unpack(row.min_step_ms, row.step_ms, row.steps),
            unpack(row.min_batch_sequences, row.batch_sequences, row.steps),
        )
        for emitted, plain, spent, batch in zip(*columns, strict=True):
            if plain is not None:
                choice[0] += emitted * plain / batch / MS_UNITS
                choice[1] += spent / batch / MS_UNITS
    return [(plain, spent) for plain, spent in sums.values()]


_COMPARED: Final = (
    PackedSteps.job_id,
    PackedSteps.request_index,
    PackedSteps.choice_index,
    PackedSteps.steps,
    PackedSteps.min_emitted_tokens,
    PackedSteps.emitted_tokens,
    PackedSteps.min_plain_step_ms,
    PackedSteps.plain_step_ms,
    PackedSteps.min_step_ms,
    PackedSteps.step_ms,
    PackedSteps.min_batch_sequences,
    PackedSteps.batch_sequences,
)


def ratio_error(blocks: Sequence[tuple[float, float]]) -> float | None:
    """Return the standard error of sum(a) / sum(b) over blocks (a, b), to first order; None below 2 blocks."""
    count, denominator = len(blocks), sum(b for _, b in blocks)
    if count < 2 or not denominator:
        return None
    ratio = sum(a for a, _ in blocks) / denominator
    squared_residuals = sum((a - ratio * b) ** 2 for a, b in blocks)
    return math.sqrt(count / (count - 1) * squared_residuals) / denominator


def _comparison(session: Session, job_id: str) -> SpeedupCheckStats | None:
    job = session.execute(
        select(JobRow.compare_plain, JobRow.compared_at, JobRow.status).where(JobRow.id == job_id)
    ).first()
    if job is None or not job.compare_plain:
        return None
    checks = session.scalars(select(CheckedRequest).where(CheckedRequest.job_id == job_id)).all()
    rows = [row for row in checks if row.error_code is None]
    failed = next((row for row in checks if row.error_code is not None), None)
    pairs = [(row.plain_ms, row.drafted_ms) for row in rows if row.plain_ms is not None and row.drafted_ms]
    return SpeedupCheckStats(
        requests_asked=job.compare_plain,
        requests=len(rows),
        done=job.compared_at is not None or job.status in UNSUCCESSFUL_JOB_STATUSES,
        speedup=_ratio(sum(plain for plain, _ in pairs), sum(drafted for _, drafted in pairs)),
        speedup_error=ratio_error(pairs),
        mean_batch_sequences=_mean([row.batch_sequences for row in rows]),
        faults=sum(not row.same_text for row in rows),
        error_code=None if failed is None else failed.error_code,
        error_message=None if failed is None else failed.error_message,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _ratio(sum(known), len(known))


def _by_depth(session: Session, scope: _Scope) -> tuple[DepthAcceptance, ...]:
    rows = session.execute(
        select(StepDepth.tree_depth, StepDepth.accepted_tokens, func.sum(StepDepth.steps))
        .where(StepDepth.tree_depth >= 1, scope.contains(StepDepth.job_id))
        .group_by(StepDepth.tree_depth, StepDepth.accepted_tokens)
    ).all()
    return tuple(_at_depth(depth, rows) for depth in range(1, max((row[0] for row in rows), default=0) + 1))


def _at_depth(depth: int, rows: Iterable[AnyRow]) -> DepthAcceptance:
    reached = [(int(steps), accepted >= depth) for tree_depth, accepted, steps in rows if tree_depth >= depth]
    tried = sum(steps for steps, _ in reached)
    accepted = sum(steps for steps, kept in reached if kept)
    return DepthAcceptance(depth, tried, accepted, accepted / tried)


def _by_rank(session: Session, scope: _Scope) -> tuple[RankAcceptance, ...]:
    rows = session.execute(
        select(StepRank.child_rank, func.sum(StepRank.tried), func.sum(StepRank.accepted))
        .where(scope.contains(StepRank.job_id))
        .group_by(StepRank.child_rank)
        .order_by(StepRank.child_rank)
    )
    return tuple(RankAcceptance(rank, int(tried), int(kept), float(kept) / float(tried)) for rank, tried, kept in rows)


def _histogram(session: Session, scope: _Scope) -> tuple[AcceptanceCount, ...]:
    rows = session.execute(
        select(StepDepth.accepted_tokens, func.sum(StepDepth.steps))
        .where(scope.contains(StepDepth.job_id))
        .group_by(StepDepth.accepted_tokens)
        .order_by(StepDepth.accepted_tokens)
    )
    return tuple(AcceptanceCount(kept, int(steps)) for kept, steps in rows)


def _batch_sizes(session: Session, scope: _Scope) -> tuple[BatchSize, ...]:
    drafted = case((StepBatchSize.drafter != "", StepBatchSize.steps), else_=0)
    sums = (StepBatchSize.steps, StepBatchSize.tree_nodes, drafted, StepBatchSize.tokens, StepBatchSize.step_ms)
    rows = session.execute(
        select(StepBatchSize.batch_sequences, *map(func.sum, sums))
        .where(scope.contains(StepBatchSize.job_id))
        .group_by(StepBatchSize.batch_sequences)
        .order_by(StepBatchSize.batch_sequences)
    )
    return tuple(_batch_size(*map(float, row)) for row in rows)


def _batch_size(batch: float, steps: float, nodes: float, drafted: float, tokens: float, step_ms: float) -> BatchSize:
    return BatchSize(int(batch), int(steps), nodes / steps, drafted / steps, tokens / steps, step_ms * batch / steps)


def _drafters(session: Session, scope: _Scope) -> tuple[DrafterShare, ...]:
    rows = session.execute(_by(StepMinute.drafter, scope))
    return tuple(
        DrafterShare(
            drafter=row[0],
            steps=int(row.steps),
            mean_tree_nodes=float(row.tree_nodes) / float(row.steps),
            mean_accepted=float(row.accepted_tokens) / float(row.steps),
            speedup=_ratio(row.plain_ms, row.compared_ms),
        )
        for row in rows
    )


def _decisions(session: Session, scope: _Scope) -> tuple[DecisionShare, ...]:
    rows = session.execute(_by(StepMinute.decision, scope)).all()
    steps = sum(int(row.steps) for row in rows)
    return tuple(
        DecisionShare(row[0], int(row.steps), int(row.steps) / steps, _ratio(row.plain_ms, row.compared_ms))
        for row in rows
    )


def _by(column: InstrumentedAttribute[str], scope: _Scope) -> Select[*tuple[Any, ...]]:
    """Return the query of step sums by a column, most steps first."""
    steps = func.sum(StepMinute.steps)
    names = ("tree_nodes", "accepted_tokens", "compared_ms", "plain_ms")
    sums = [func.sum(getattr(StepMinute, name)).label(name) for name in names]
    asked = select(column, steps.label("steps"), *sums).where(scope.contains(StepMinute.job_id), StepMinute.steps > 0)
    return asked.group_by(column).order_by(steps.desc(), column)


def _expectations(session: Session, scope: _Scope) -> list[Expectation]:
    sums = (StepExpectation.steps, StepExpectation.expected_accepted, StepExpectation.accepted_tokens)
    rows = session.execute(
        select(*map(func.sum, sums))
        .where(scope.contains(StepExpectation.job_id))
        .group_by(StepExpectation.quarter)
        .order_by(StepExpectation.quarter)
    )
    return [Expectation(int(row[0]), float(row[1]) / float(row[0]), float(row[2]) / float(row[0])) for row in rows]


def _miscalibration(expectations: Iterable[Expectation]) -> float | None:
    expected = sum(e.mean_expected * e.steps for e in expectations)
    accepted = sum(e.mean_accepted * e.steps for e in expectations)
    return _ratio(abs(expected - accepted), accepted)


def _busy_s(spans: _Spans, minute: int) -> float:
    """Return how many seconds of a minute lie in the intervals."""
    first = max(0, bisect_right(spans, (minute, math.inf)) - 1)  # the last interval that starts by then
    among = takewhile(lambda span: span[0] < minute + _MINUTE_S, islice(spans, first, None))
    return sum(max(0.0, min(end, minute + _MINUTE_S) - max(begin, minute)) for begin, end in among)


def _minutes(session: Session, scope: _Scope, spans: _Spans) -> tuple[Minute, ...]:
    names = ("tokens", "first_tokens", "steps", "plain_ms", "compared_ms")
    rows = session.execute(
        select(StepMinute.minute, *(func.sum(getattr(StepMinute, name)).label(name) for name in names))
        .where(scope.contains(StepMinute.job_id))
        .group_by(StepMinute.minute)
        .order_by(StepMinute.minute)
    )
    return tuple(
        Minute(
            minute=row.minute,
            tokens=int(row.tokens + row.first_tokens),
            busy_s=round(_busy_s(spans, row.minute), 3),
            mean_acceptance_length=_ratio(row.tokens, row.steps),
            speedup=_ratio(row.plain_ms, row.compared_ms),
        )
        for row in rows
    )


def _tokens_per_joule(session: Session) -> float | None:
    tokens = session.scalar(
        select(func.sum(StepMinute.tokens + StepMinute.first_tokens)).where(
            select(WorkerEnergy.minute)
            .where(StepMinute.worker_id == WorkerEnergy.worker_id, StepMinute.minute == WorkerEnergy.minute)
            .correlate(StepMinute)
            .exists()
        )
    )
    return _ratio(tokens, session.scalar(select(func.sum(WorkerEnergy.joules))))


@dataclass(frozen=True, slots=True)
class JobSummary:
    """One row of the table of jobs. None: not measured."""

    id: str
    status: str
    model: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    requests_total: int
    requests_completed: int
    requests_failed: int
    prompt_tokens: int
    completion_tokens: int
    requests_cached: int
    cached_completion_tokens: int
    wall_s: float | None
    tokens_per_s: float | None
    steps: int
    mean_acceptance_length: float | None
    mean_accepted: float | None
    mean_expected: float | None
    mean_tree_nodes: float | None
    speedup: float | None
    plain_check: float | None
    draft_share: float | None
    verify_share: float | None


def job_summaries(
    session: Session, limit: int, owner: str | None = None, job_id: str | None = None
) -> list[JobSummary]:
    """Return the newest jobs, or one job, with their statistics."""
    mine = true() if owner is None else JobRow.api_key_id == owner
    asked = true() if job_id is None else JobRow.id == job_id
    jobs = session.execute(
        select(shown_status(JobRow).label("status"), *(getattr(JobRow, name) for name in _OF_JOB))
        .where(mine, asked, JobRow.erased_at.is_(None), JobRow.verification_of.is_(None))
        .order_by(JobRow.created_at.desc(), JobRow.id.desc())
        .limit(limit)
    ).all()
    sums = _sums_by_job(session, [job.id for job in jobs])
    now = database_now(session)
    return [_job_row(job, sums.get(job.id), now) for job in jobs]


_OF_JOB: Final = (
    "id",
    "model",
    "created_at",
    "started_at",
    "finished_at",
    "requests_total",
    "requests_completed",
    "requests_failed",
    "prompt_tokens",
    "completion_tokens",
    "requests_cached",
    "cached_completion_tokens",
)


def _sums_by_job(session: Session, job_ids: Sequence[str]) -> dict[str, AnyRow]:
    rows = session.execute(
        select(StepMinute.job_id, *_sum_columns()).where(StepMinute.job_id.in_(job_ids)).group_by(StepMinute.job_id)
    )
    return {row.job_id: row for row in rows}


def _job_row(job: AnyRow, sums: AnyRow | None, now: float) -> JobSummary:
    wall_s = None if job.started_at is None else max(0.0, (job.finished_at or now) - job.started_at)

    def ratio(part: str, whole: str) -> float | None:
        return None if sums is None else _ratio(getattr(sums, part), getattr(sums, whole))

    return JobSummary(
        **job._mapping,
        wall_s=wall_s,
        tokens_per_s=_ratio(job.completion_tokens - job.cached_completion_tokens, wall_s),
        steps=0 if sums is None else int(sums.steps),
        mean_acceptance_length=ratio("tokens", "steps"),
        mean_accepted=ratio("accepted_tokens", "steps"),
        mean_expected=ratio("expected_accepted", "steps"),
        mean_tree_nodes=ratio("tree_nodes", "steps"),
        speedup=ratio("plain_ms", "compared_ms"),
        plain_check=ratio("plain_spent_ms", "plain_expected_ms"),
        draft_share=ratio("draft_ms", "step_ms"),
        verify_share=ratio("verify_ms", "step_ms"),
    )
