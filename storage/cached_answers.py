"""Cached answers: a request whose answer its owner has already is not computed, but gets a copy.

Equal requests of one owner have the same `requests.identity`, and workers that would compute the same answer have the
same `CacheScope`. An answer can be copied if its request has both. A claim leaves out requests with such an answer, and
those whose answer a worker computes now (`Repeats`); the worker then calls `copy_answers`. Nothing of a wait is stored:
each claim looks again, so that a request is claimed if the one that it waited for fails, is cancelled, paused or
erased.

Only requests that were never claimed are answered so. A copy is no source of further copies: its identity is NULL.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    exists,
    func,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.orm import Session, aliased

from storage.dialect import (
    AnyRow,
    database_now,
    dialect_of,
    has_keys,
    insert_many,
    is_one_of,
    is_request,
    is_serving,
    key_parameters,
)
from storage.models import ChoiceOutput, JobRow, PackedSteps, Request
from storage.progress.json_text import to_json
from storage.progress.new_rows import insert_new
from storage.records import RequestKey
from storage.steps.columns import StepColumns
from storage.steps.packing import packed_rows
from storage.transitions import end_finished_jobs, lock_jobs

CACHED: Final = "cached"  # `decision` of the row in `decode_steps` that stands for a copied answer
MAX_REPEATS: Final = 256  # identities that a claim leaves out before it takes no more of a job
MAX_LEADERS: Final = 128  # of one claim on PostgreSQL, where each takes a lock of the server's common table
_COPIES: Final = 256  # of one transaction
_COPIED_CHARS: Final = 16 << 20  # of the texts of one transaction
_FAILURES: Final = 2  # of requests with an identity, after which others with it do not wait any more
_LAST_SEQ: Final = 2  # of the events `started`, `tokens` and `finished`


@dataclass(frozen=True, slots=True)
class CacheScope:
    """What decides the answers of a worker beside the requests: workers with one scope answer alike."""

    name: str  # a hash of it
    numerics: str  # fingerprint, which is a part of it


@dataclass(slots=True)
class Repeats:
    """What a worker's claims leave out: requests with an answer to copy, and those that wait for one.

    Each claim calls `begin`, and `left_over` with the requests that it may take.
    """

    scope: CacheScope
    answered: set[str] = field(default_factory=set)  # identities with an answer to copy
    waiting: set[str] = field(default_factory=set)  # identities whose answer is being computed
    refused: set[str] = field(default_factory=set)  # identities with an answer that could not be copied
    _led: set[str] = field(default_factory=set)  # identities of requests that this claim takes

    def begin(self) -> None:
        """Begin a claim: what the last one saw may have changed."""
        self.answered, self.waiting, self._led = set(), set(), set()

    @property
    def full(self) -> bool:
        """Whether the claim has left out, or takes, as many as one claim may."""
        return len(self.answered) + len(self.waiting) >= MAX_REPEATS or len(self._led) >= MAX_LEADERS

    def allowed(self) -> ColumnElement[bool] | None:
        """Return the condition that a request is none of those that are left out; None: none is."""
        left_out = self.answered | self.waiting
        fresh = Request.lease_number == 0
        return ~and_(fresh, func.coalesce(Request.identity, "").in_(left_out)) if left_out else None

    def left_over(self, session: Session, rows: Sequence[AnyRow], *, wait: bool = True) -> list[RequestKey]:
        """Return those of the locked requests that must be computed now, in order.

        Without `wait`, a request with no finished answer is computed, even if another worker does the same: the caller
        of an interactive request must not wait for a batch.
        """
        named = {row.identity for row in rows if row.identity is not None}
        taken_now = _others_claim(session, named - self._led) if wait else set()
        found = self._known(session, [row for row in rows if row.identity is not None and row.lease_number == 0])
        taken: list[RequestKey] = []
        for row in rows:
            key, state = (row.job_id, row.request_index), found.get((row.job_id, row.request_index))
            if state is not None and state.answered and row.identity not in self.refused:
                self.answered.add(row.identity)
            elif state is not None and wait and (state.computed or row.identity in self._led | taken_now):
                self.waiting.add(row.identity)
            else:
                taken.append(key)
                if row.identity is not None and (state is None or not state.fails):
                    self._led.add(row.identity)
        return taken

    def _known(self, session: Session, rows: Sequence[AnyRow]) -> dict[RequestKey, AnyRow]:
        """Return what is known of the identities of requests that were never claimed."""
        if not rows:
            return {}
        jobs, parameters = key_parameters((row.job_id, row.request_index) for row in rows)
        given = {**parameters, "scope": self.scope.name, "numerics": self.scope.numerics}
        found = session.execute(_lookup(jobs), given)
        return {(row.job_id, row.request_index): row for row in found}


def _others_claim(session: Session, identities: Collection[str]) -> set[str]:
    """Lock these identities until the end of the transaction; return those that another claim has locked.

    On SQLite, claims run one after the other.
    """
    if dialect_of(session) != "postgresql" or not identities:
        return set()
    return set(session.scalars(_TRY_LOCKS, {"identities": sorted(identities)}))


_TRY_LOCKS: Final = text(
    "SELECT identity FROM unnest(CAST(:identities AS TEXT[])) AS asked (identity)"
    " WHERE NOT pg_try_advisory_xact_lock(hashtextextended(identity, 0))"
)


@lru_cache(maxsize=64)  # as the statements of claims: to build one takes longer than to run it
def _lookup(jobs: int) -> Select[*tuple[Any, ...]]:
    """Return the query of what is known of a request's identity; a pilot is computed, as its steps are its purpose."""
    other, job = aliased(Request), aliased(JobRow)
    same = and_(other.identity == Request.identity, other.cache_scope == bindparam("scope"))
    # One that was begun and waits, such as after the death of its worker, is not overtaken: it has tokens already.
    soon = and_(other.status == "queued", other.lease_number > 0, job.priority_class >= JobRow.priority_class)
    serving = and_(job.status == "in_progress", job.paused_at.is_(None), job.erased_at.is_(None))
    answered = exists().where(same, *_is_source(other, job))
    computed = exists().where(same, or_(other.status == "running", soon), job.id == other.job_id, serving)
    failed = and_(other.identity == Request.identity, other.status == "failed", other.lease_number > 0)
    failures = select(other.job_id).where(failed).limit(_FAILURES).correlate(Request).subquery()
    fails = select(func.count()).select_from(failures).scalar_subquery() >= _FAILURES
    columns = (Request.job_id, Request.request_index, answered.label("answered"), fails.label("fails"))
    return (
        select(*columns, and_(computed, ~fails).label("computed"))
        .join(JobRow, JobRow.id == Request.job_id)
        .where(has_keys(jobs), ~JobRow.pilot_only)
    )


def _is_source(request: Any, job: Any) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that the answer of a request may be copied; parameters: `scope`, `numerics`."""
    its_output = and_(ChoiceOutput.job_id == request.job_id, ChoiceOutput.request_index == request.request_index)
    other_bits = func.coalesce(ChoiceOutput.numerics, "") != bindparam("numerics")
    return (
        request.status == "completed",
        request.cache_scope == bindparam("scope"),
        job.id == request.job_id,
        job.erased_at.is_(None),
        exists().where(its_output),
        ~exists().where(its_output, other_bits),
    )


@dataclass(frozen=True, slots=True)
class CopiedChoice:
    """A choice of a copied answer, for the events of its request."""

    choice_index: int
    text: str
    completion_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class CopiedAnswer:
    """A request that was answered by a copy."""

    job_id: str
    request_index: int
    custom_id: str
    choices: tuple[CopiedChoice, ...]


@dataclass(frozen=True, slots=True)
class Copied:
    """What one transaction has answered."""

    answers: tuple[CopiedAnswer, ...] = ()
    ended_jobs: tuple[tuple[str, str], ...] = ()  # (job_id, final status)
    more: bool = False  # more requests can be answered: call again


def copy_answers(session: Session, identities: Collection[str], scope: CacheScope) -> Copied:
    """Answer queued requests with these identities by copies of the answers that are there; end their jobs."""
    waiting, sources = _targets(session, identities), _sources(session, identities, scope)
    waiting = [row for row in waiting if row.identity in sources]
    if not waiting:
        return Copied()
    # Erasing a source waits for this transaction, and this one sees what was erased before.
    locked = lock_jobs(session, JobRow.id.in_({row.job_id for row in (*waiting, *sources.values())}))
    sources = _sources(session, identities, scope)
    numbers = _event_numbers(session, locked)
    choices = _choices(session, sources.values())
    kept = {identity for identity, row in sources.items() if (row.job_id, row.request_index) in choices}
    targets = [row for row in _locked(session, waiting) if row.identity in kept and row.job_id in numbers]
    fitting = _fitting(targets, sources, choices)
    now = database_now(session)
    pairs = [(target, sources[target.identity]) for target in fitting]
    _insert_copies(session, pairs, choices, numbers, now)
    _complete(session, pairs, numbers, now)
    _count_copies(session, pairs, choices, now)
    return Copied(
        answers=tuple(_answer(target, choices[source.job_id, source.request_index]) for target, source in pairs),
        ended_jobs=tuple(end_finished_jobs(session, {target.job_id for target in fitting})),
        more=bool(fitting) and (len(fitting) < len(targets) or len(waiting) == _COPIES),
    )


_REPEAT: Final = (Request.job_id, Request.request_index, Request.custom_id, Request.identity)


def _targets(session: Session, identities: Collection[str]) -> Sequence[AnyRow]:
    may_be = (Request.identity.in_(identities), Request.status == "queued", Request.lease_number == 0)
    open_job = (
        is_serving(),
        ~JobRow.pilot_only,
    )  # as claims have it, or a request would be neither claimed nor answered
    query = select(*_REPEAT).join(JobRow, JobRow.id == Request.job_id).where(*may_be, *open_job)
    return session.execute(query.order_by(Request.job_id, Request.request_index).limit(_COPIES)).all()


def _locked(session: Session, rows: Iterable[AnyRow]) -> Sequence[AnyRow]:
    """Lock those of the requests that are still queued, and that no claim has locked."""
    still = (is_request([(row.job_id, row.request_index) for row in rows]), Request.status == "queued")
    query = select(*_REPEAT).where(*still, Request.lease_number == 0, Request.identity.is_not(None))
    ordered = query.order_by(Request.job_id, Request.request_index)
    return session.execute(ordered.with_for_update(key_share=True, skip_locked=True)).all()


def _sources(session: Session, identities: Collection[str], scope: CacheScope) -> dict[str, AnyRow]:
    """Return one request with an answer to copy for each identity that has any."""
    columns = (Request.identity, Request.job_id, Request.request_index)
    query = select(*columns, Request.answer_format, Request.sampling_defaults)
    rows = session.execute(
        query.where(Request.identity.in_(identities), *_is_source(Request, JobRow)).order_by(*columns),
        {"scope": scope.name, "numerics": scope.numerics},
    )
    return {row.identity: row for row in reversed(rows.all())}


def _event_numbers(session: Session, job_ids: Collection[str]) -> dict[str, int]:
    """Return the next event number of those locked jobs that still may get answers."""
    query = select(JobRow.id, JobRow.event_number).where(JobRow.id.in_(job_ids), is_serving(), ~JobRow.pilot_only)
    return {row.id: row.event_number + 1 for row in session.execute(query)}


_COPIED_COLUMNS: Final = (
    *("text", "finish_reason", "prompt_tokens", "completion_tokens", "token_ids", "logprobs", "prompt", "worker_id"),
    *("first_of_prompt", "reasoning_tokens", "numerics"),
)
_JSON: Final = frozenset({"token_ids", "logprobs", "prompt"})  # are copied as their texts


def _choices(session: Session, sources: Iterable[AnyRow]) -> Mapping[RequestKey, list[AnyRow]]:
    columns = (getattr(ChoiceOutput, name) for name in _COPIED_COLUMNS)
    texts = (cast(column, Text).label(column.key) if column.key in _JSON else column for column in columns)
    key = (ChoiceOutput.job_id, ChoiceOutput.request_index)
    which = is_one_of(key, [(source.job_id, source.request_index) for source in sources])
    found: defaultdict[RequestKey, list[AnyRow]] = defaultdict(list)
    query = select(*key, ChoiceOutput.choice_index, *texts).where(which)
    for row in session.execute(query.order_by(*key, ChoiceOutput.choice_index)):
        found[row.job_id, row.request_index].append(row)
    return found


def _fitting(
    targets: Sequence[AnyRow], sources: Mapping[str, AnyRow], choices: Mapping[RequestKey, list[AnyRow]]
) -> list[AnyRow]:
    """Return the first of the requests, whose texts fit into one transaction."""
    fitting: list[AnyRow] = []
    chars = 0
    for target in targets:
        source = sources[target.identity]
        chars += sum(len(row.text) for row in choices[source.job_id, source.request_index])
        if fitting and chars > _COPIED_CHARS:
            break
        fitting.append(target)
    return fitting


_Pairs = Sequence[tuple[AnyRow, AnyRow]]  # a request and the one whose answer it gets


def _insert_copies(
    session: Session,
    pairs: _Pairs,
    choices: Mapping[RequestKey, list[AnyRow]],
    numbers: Mapping[str, int],
    now: float,
) -> None:
    """Write the outputs, and for each a row of steps that holds all its tokens: no rollup counts it."""
    outputs: dict[tuple[Any, ...], dict[str, Any]] = {}
    steps: list[dict[str, Any]] = []
    for target, source in pairs:
        for choice in choices[source.job_id, source.request_index]:
            key = {
                "job_id": target.job_id,
                "request_index": target.request_index,
                "choice_index": choice.choice_index,
            }
            number = numbers[target.job_id]
            checkpoint = (number, _LAST_SEQ - 1, len(choice.text), choice.completion_tokens, 0)
            outputs[tuple(key.values())] = {name: getattr(choice, name) for name in _COPIED_COLUMNS} | {
                "accepted_tokens": 0,
                "pieces": to_json([(choice.text, "target")] if choice.text else []),
                "started_at": now,
                "finished_at": now,
                "last_seq": _LAST_SEQ,
                "checkpoints": to_json([checkpoint]),
                "event_number": number,
                "cached_from": f"{source.job_id}/{source.request_index}",
            }
            if choice.completion_tokens:
                steps += packed_rows(key, choice.worker_id, _all_at_once(choice.completion_tokens, now), 0)
    if outputs:
        insert_new(session, ChoiceOutput, outputs)
    if steps:
        insert_many(session, PackedSteps, steps)


def _all_at_once(tokens: int, now: float) -> StepColumns:
    columns = StepColumns()
    columns.add(
        ended_at=now,
        tree_nodes=0,
        tree_depth=0,
        accepted_tokens=0,
        emitted_tokens=tokens,
        expected_accepted=None,
        draft_ms=0.0,
        verify_ms=0.0,
        step_ms=0.0,
        batch_sequences=1,
        plain_step_ms=None,
        drafter=None,
        decision=CACHED,
    )
    return columns


def _complete(session: Session, pairs: _Pairs, numbers: Mapping[str, int], now: float) -> None:
    if pairs:
        rows = [
            {
                "job_id": target.job_id,
                "request_index": target.request_index,
                "status": "completed",
                "started_at": now,
                "finished_at": now,
                "event_number": numbers[target.job_id],
                "identity": None,
                "answer_format": source.answer_format,
                "sampling_defaults": source.sampling_defaults,
            }
            for target, source in pairs
        ]
        session.execute(update(Request), rows)


def _count_copies(session: Session, pairs: _Pairs, choices: Mapping[RequestKey, list[AnyRow]], now: float) -> None:
    requests: Counter[str] = Counter()
    prompts: Counter[str] = Counter()
    completions: Counter[str] = Counter()
    for target, source in pairs:
        own = choices[source.job_id, source.request_index]
        requests[target.job_id] += 1
        prompts[target.job_id] += sum(row.prompt_tokens for row in own if row.first_of_prompt)
        completions[target.job_id] += sum(row.completion_tokens for row in own)
    rows = [
        {"job": job_id, "count": count, "prompt": prompts[job_id], "completion": completions[job_id], "now": now}
        for job_id, count in requests.items()
    ]
    if rows:
        session.connection().execute(_COUNTED, rows)


_COUNTED: Final = (
    update(JobRow)
    .where(JobRow.id == bindparam("job"))
    .values(
        requests_completed=JobRow.requests_completed + bindparam("count"),
        requests_cached=JobRow.requests_cached + bindparam("count"),
        prompt_tokens=JobRow.prompt_tokens + bindparam("prompt"),
        cached_prompt_tokens=JobRow.cached_prompt_tokens + bindparam("prompt"),
        completion_tokens=JobRow.completion_tokens + bindparam("completion"),
        cached_completion_tokens=JobRow.cached_completion_tokens + bindparam("completion"),
        event_number=JobRow.event_number + 1,
        started_at=func.coalesce(JobRow.started_at, bindparam("now")),
    )
)


def _answer(target: AnyRow, choices: Iterable[AnyRow]) -> CopiedAnswer:
    copied = (CopiedChoice(row.choice_index, row.text, row.completion_tokens, row.finish_reason) for row in choices)
    return CopiedAnswer(target.job_id, target.request_index, target.custom_id, tuple(copied))


def claimed_scope() -> ColumnElement[str | None]:
    """Return the value of `cache_scope` for a request that a worker claims, from its earlier one and `scope`."""
    scope = bindparam("scope", type_=Text())
    same = or_(Request.lease_number == 0, Request.cache_scope == scope)
    return case((and_(Request.identity.is_not(None), same), scope), else_=None)
