"""The flush: write all progress of a worker in one transaction, fenced by its leases and safe to repeat.

Leases are checked under row locks; only progress under a held lease is written. A worker that does not know whether a
flush was committed sends it again: existing checkpoints and outputs are left alone, and nothing is counted twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache
from itertools import groupby
from typing import Any, Final

from sqlalchemy import Insert, Update, bindparam, select, update
from sqlalchemy.orm import Session

from storage import numerics as fingerprints
from storage import rollups
from storage.budgets import pause_spent
from storage.dialect import (
    dialect_of,
    has_keys,
    insert_for,
    insert_many,
    is_request,
    key_parameters,
    storable,
)
from storage.models import ChoiceOutput, DraftTree, JobRow, PackedSteps, Request, Served
from storage.progress.checkpoints import ChoiceKey, StoredCheckpoint, take_checkpoints, write_checkpoints
from storage.progress.json_text import to_json
from storage.progress.lease_check import LeaseState, check_leases
from storage.progress.new_rows import insert_new
from storage.records import (
    FinishedChoice,
    FlushResult,
    Lease,
    RequestFailure,
    RequestKey,
    RequestProgress,
)
from storage.steps.columns import StepColumns
from storage.steps.packing import packed_rows
from storage.transitions import cancel_requests, end_finished_jobs, error_columns, return_requests


def flush(
    session: Session,
    worker_id: str,
    lease_s: float,
    progress: Sequence[RequestProgress],
    held: Sequence[Lease],
    numerics: str | None = None,
) -> FlushResult:
    """Renew a worker's leases and write the progress of its requests; return the lost leases and the ended jobs.

    A lapsed lease is renewed if no other worker has claimed the request. A lease is lost if the request has a new
    owner, was ended by another process or is past its deadline, or if the job is cancelled or has ended. Progress under
    a lost lease is not written. Progress of a paused job is written, and its unfinished requests return to the queue.
    `numerics` is the worker's fingerprint, noted with all that it writes.
    """
    leases = set(held).union(entry.lease for entry in progress)
    if not leases:
        return FlushResult(frozenset(), ())
    check = check_leases(session, worker_id, leases)
    numbers, now = check.event_numbers, check.now
    ours = [entry for entry in progress if check.states[entry.lease] is LeaseState.HELD]
    _renew(session, check.keys(LeaseState.HELD), now + lease_s)
    _clear_suspects(session, worker_id, {e.lease.key for e in ours if e.checkpoints} & check.unproven, now)
    counts = _JobCounts()
    _write_plans(session, ours)
    written = write_checkpoints(session, worker_id, ours, now, numbers, numerics)
    counts.completion_tokens.update(written)
    counts.changed |= written.keys()
    _write_outputs(session, _FlushingWorker(worker_id, numerics), ours, numbers, counts)
    _end_requests(session, ours, now, numbers, counts)
    cancelled = check.keys(LeaseState.CANCELLED)
    cancel_requests(session, cancelled, now)
    returned = return_requests(session, is_request(check.paused)) if check.paused else set()
    _count(session, counts)
    if check.budgeted:
        pause_spent(session, check.budgeted, now)
    return FlushResult(
        lost=frozenset(check.keys(LeaseState.LOST) | cancelled),
        returned=frozenset(returned),
        ended_jobs=tuple(end_finished_jobs(session, {job_id for job_id, _ in counts.ended | cancelled})),
    )


@dataclass(frozen=True, slots=True)
class _FlushingWorker:
    """The worker that flushes."""

    worker_id: str
    numerics: str | None


@dataclass(slots=True)
class _JobCounts:
    """Counts that a flush adds to its jobs, by job id."""

    completed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)
    ended: set[RequestKey] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)  # jobs with new events for readers

    @property
    def job_ids(self) -> list[str]:
        return sorted({*self.completed, *self.failed, *self.prompt_tokens, *self.completion_tokens, *self.changed})


def _renew(session: Session, keys: Collection[RequestKey], until: float) -> None:
    if keys:
        jobs, parameters = key_parameters(keys)
        session.connection().execute(_renewal(jobs), {**parameters, "until": until})


@lru_cache(maxsize=64)
def _renewal(jobs: int) -> Update:
    return update(Request).where(has_keys(jobs)).values(lease_expires_at=bindparam("until"))


def _clear_suspects(session: Session, worker_id: str, keys: Collection[RequestKey], now: float) -> None:
    """Clear requests that have first tokens under this lease, and note that the worker serves requests."""
    if not keys:
        return
    jobs, parameters = key_parameters(keys)
    connection = session.connection()
    connection.execute(_clearing(jobs), parameters)
    serving = {"worker": worker_id, "job": min(keys)[0], "now": now}
    connection.execute(_serving(dialect_of(session)), serving)


@lru_cache(maxsize=64)
def _clearing(jobs: int) -> Update:
    cleared = {
        "proven": True,
        "suspect_group": None,
        "lone_crashes": 0,
        "lone_served": False,
        "lone_host": None,
    }
    return update(Request).where(has_keys(jobs)).values(**cleared)


@cache
def _serving(dialect: str) -> Insert:
    model = select(JobRow.model).where(JobRow.id == bindparam("job")).scalar_subquery()
    served = insert_for(dialect, Served).values(worker_id=bindparam("worker"), model=model, last_at=bindparam("now"))
    return served.on_conflict_do_update(index_elements=["worker_id"], set_={"last_at": bindparam("now")})


def _write_plans(session: Session, progress: Iterable[RequestProgress]) -> None:
    rows = [
        {"job_id": entry.lease.job_id, "request_index": entry.lease.request_index, **asdict(entry.plan)}
        for entry in progress
        if entry.plan is not None
    ]
    if rows:
        session.execute(update(Request), rows)


def _write_outputs(
    session: Session,
    writer: _FlushingWorker,
    progress: Iterable[RequestProgress],
    numbers: Mapping[str, int],
    counts: _JobCounts,
) -> None:
    """Move the checkpoints of finished choices into outputs and step rows."""
    finished = {(*entry.lease.key, choice.choice_index): choice for entry in progress for choice in entry.finished}
    if not finished:
        return
    checkpoints = take_checkpoints(session, finished)
    rows = {
        key: {**_output_columns(choice, checkpoints[key], writer), "event_number": numbers[key[0]]}
        for key, choice in finished.items()
    }
    written = set(insert_new(session, ChoiceOutput, rows))
    steps = {key: _steps(checkpoints[key]) for key in finished if key in written}
    _insert_steps(session, steps)
    rollups.add_steps(session, [(key[0], parts) for key, parts in steps.items()])
    _count_outputs(finished, written, checkpoints, counts)


_CHOICE_COLUMNS = tuple(column.name for column in fields(FinishedChoice) if column.name != "choice_index")


def _output_columns(
    choice: FinishedChoice, checkpoints: Sequence[StoredCheckpoint], writer: _FlushingWorker
) -> dict[str, Any]:
    logprobs = _all_logprobs(checkpoints)
    return {
        **{name: getattr(choice, name) for name in _CHOICE_COLUMNS},  # asdict() would copy each token
        "text": storable(choice.text),
        "token_ids": to_json(choice.token_ids),
        "accepted_tokens": sum(part.accepted_tokens for part in checkpoints),
        "pieces": to_json(merge_pieces(piece for part in checkpoints for piece in part.pieces)),
        "logprobs": None if logprobs is None else to_json(logprobs),
        "prompt": None if choice.prompt is None else to_json(choice.prompt),
        "worker_id": writer.worker_id,
        "numerics": fingerprints.joined([part.numerics for part in checkpoints] or [writer.numerics]),
        "checkpoints": to_json(
            [
                (part.event_number, part.seq, part.num_chars, part.num_tokens, part.accepted_tokens)
                for part in checkpoints
            ]
        ),
    }


def _all_logprobs(checkpoints: Sequence[StoredCheckpoint]) -> list[Any] | None:
    """Return the logprobs of all checkpoints, of all owners; None if the request wants none."""
    parts = [part.logprobs for part in checkpoints]
    return None if not parts or None in parts else [row for part in parts for row in part or ()]


def merge_pieces(pieces: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Join adjacent pieces of the same source."""
    return [
        ("".join(text for text, _ in group), source) for source, group in groupby(pieces, key=lambda piece: piece[1])
    ]


def _steps(checkpoints: Iterable[StoredCheckpoint]) -> list[tuple[str, StepColumns]]:
    """Return the steps of a choice in commit order, by worker: each owner's are one part."""
    parts: list[tuple[str, StepColumns]] = []
    for part in checkpoints:
        if parts and parts[-1][0] == part.worker_id:
            parts[-1][1].extend(part.steps)
        elif len(part.steps):
            parts.append((part.worker_id, part.steps))
    return parts


def _insert_steps(session: Session, steps: Mapping[ChoiceKey, Sequence[tuple[str, StepColumns]]]) -> None:
    """Write the steps of choices, and their recorded trees, numbered from 0: each owner counts its own from 0."""
    rows: list[dict[str, Any]] = []
    trees: list[dict[str, Any]] = []
    for (job_id, request_index, choice_index), parts in steps.items():
        key = {"job_id": job_id, "request_index": request_index, "choice_index": choice_index}
        first = 0
        for worker_id, part in parts:
            rows += packed_rows(key, worker_id, part, first)
            trees += [{**key, "step": first + position, **asdict(tree)} for position, tree in part.trees.items()]
            first += len(part)
    if rows:
        insert_many(session, PackedSteps, rows)
    if trees:
        insert_many(session, DraftTree, trees)


def _count_outputs(
    finished: dict[ChoiceKey, FinishedChoice],
    written: Collection[tuple[Any, ...]],
    checkpoints: Mapping[ChoiceKey, Sequence[StoredCheckpoint]],
    counts: _JobCounts,
) -> None:
    """Replace the counted tokens of checkpoints by those of their outputs."""
    for key, choice in finished.items():
        job_id, _, _ = key
        counts.completion_tokens[job_id] -= sum(part.num_tokens for part in checkpoints[key])
        if key in written:
            counts.changed.add(job_id)
            counts.completion_tokens[job_id] += choice.completion_tokens
            counts.prompt_tokens[job_id] += choice.prompt_tokens if choice.first_of_prompt else 0


def _end_requests(
    session: Session, progress: Iterable[RequestProgress], now: float, numbers: Mapping[str, int], counts: _JobCounts
) -> None:
    failed = {entry.lease.key: entry.failure for entry in progress if entry.failure is not None}
    completed = {entry.lease.key for entry in progress if entry.ends} - failed.keys()
    counts.completed.update(job_id for job_id, _ in completed)
    counts.failed.update(job_id for job_id, _ in failed)
    counts.ended |= completed | failed.keys()
    counts.changed |= {job_id for job_id, _ in counts.ended}
    for job_id in {job_id for job_id, _ in completed}:
        _, parameters = key_parameters(key for key in completed if key[0] == job_id)
        session.connection().execute(_COMPLETED, {**parameters, "now": now, "number": numbers[job_id]})
    if failed:
        rows = [_failed_row(key, failure, now, numbers[key[0]]) for key, failure in failed.items()]
        session.execute(update(Request), rows)


_COMPLETED: Final = (
    update(Request)
    .where(has_keys(1))
    .values(status="completed", finished_at=bindparam("now"), lease_expires_at=None, event_number=bindparam("number"))
)


def _failed_row(key: RequestKey, failure: RequestFailure, now: float, event_number: int) -> dict[str, Any]:
    job_id, request_index = key
    return {
        "job_id": job_id,
        "request_index": request_index,
        "status": "failed",
        "finished_at": now,
        "lease_expires_at": None,
        "event_number": event_number,
        **error_columns(failure),
    }


def _count(session: Session, counts: _JobCounts) -> None:
    """Add the counts to the rows of the jobs, which the caller has locked."""
    rows = [
        {
            "job": job_id,
            "completed": counts.completed[job_id],
            "failed": counts.failed[job_id],
            "prompt": counts.prompt_tokens[job_id],
            "completion": counts.completion_tokens[job_id],
            "new_event": int(job_id in counts.changed),
        }
        for job_id in counts.job_ids
    ]
    if not rows:
        return
    # By the connection: a Session would take an UPDATE with a list of values for an UPDATE by primary key.
    session.connection().execute(_COUNTED, rows)


_COUNTED: Final = (
    update(JobRow)
    .where(JobRow.id == bindparam("job"))
    .values(
        requests_completed=JobRow.requests_completed + bindparam("completed"),
        requests_failed=JobRow.requests_failed + bindparam("failed"),
        prompt_tokens=JobRow.prompt_tokens + bindparam("prompt"),
        completion_tokens=JobRow.completion_tokens + bindparam("completion"),
        event_number=JobRow.event_number + bindparam("new_event"),
    )
)
