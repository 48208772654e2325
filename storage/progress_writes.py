"""The flush: write all progress of a worker in one transaction, fenced by its leases and safe to repeat.

Leases are checked under row locks; only progress under a held lease is written. A worker that does not know whether a
flush was committed sends it again: existing checkpoints and outputs are left alone, and nothing is counted twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum, auto
from itertools import groupby
from typing import Any

from sqlalchemy import bindparam, delete, select, update
from sqlalchemy.orm import Session

from storage import rollups
from storage.dialect import (
    AnyRow,
    database_now,
    insert_into,
    insert_many,
    insert_or_ignore,
    is_one_of,
    is_request,
    storable,
)
from storage.models import ChoiceOutput, DraftTree, JobRow, PackedSteps, Partial, Request, Served
from storage.records import (
    Checkpoint,
    FinishedChoice,
    FlushResult,
    Lease,
    RequestFailure,
    RequestKey,
    RequestProgress,
)
from storage.steps.columns import StepColumns, stored_steps
from storage.steps.packing import packed_rows
from storage.transitions import cancel_requests, end_finished_jobs, error_columns

ChoiceKey = tuple[str, int, int]  # (job_id, request_index, choice_index)


def flush(
    session: Session, worker_id: str, lease_s: float, progress: Sequence[RequestProgress], held: Sequence[Lease]
) -> FlushResult:
    """Renew a worker's leases and write the progress of its requests; return the lost leases and the ended jobs.

    A lapsed lease is renewed if no other worker has claimed the request. A lease is lost if the request has a new
    owner, was ended by another process or is past its deadline, or if the job is cancelled or has ended. Progress under
    a lost lease is not written.
    """
    leases = set(held).union(entry.lease for entry in progress)
    if not leases:
        return FlushResult(frozenset(), ())
    states, numbers = _check_leases(session, worker_id, leases)
    ours = [entry for entry in progress if states[entry.lease] is _LeaseState.HELD]
    now = database_now(session)
    _renew(session, _keys(states, _LeaseState.HELD), now + lease_s)
    _clear_suspects(session, worker_id, {entry.lease.key for entry in ours if entry.checkpoints}, now)
    counts = _JobCounts()
    _write_plans(session, ours)
    _write_checkpoints(session, worker_id, ours, now, numbers, counts)
    _write_outputs(session, worker_id, ours, numbers, counts)
    _end_requests(session, ours, now, numbers, counts)
    cancelled = _keys(states, _LeaseState.CANCELLED)
    cancel_requests(session, cancelled, now)
    _count(session, counts)
    return FlushResult(
        lost=frozenset(_keys(states, _LeaseState.LOST) | cancelled),
        ended_jobs=tuple(end_finished_jobs(session, {job_id for job_id, _ in counts.ended | cancelled})),
    )


class _LeaseState(Enum):
    """What a flush may do under a lease."""

    HELD = auto()
    ENDED = auto()  # this owner has ended the request already: the flush is a repeat
    CANCELLED = auto()  # held, but the job is being cancelled
    LOST = auto()


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


def _check_leases(
    session: Session, worker_id: str, leases: Collection[Lease]
) -> tuple[dict[Lease, _LeaseState], dict[str, int]]:
    """Lock jobs and requests of the leases; return the state of each lease and the next event number of each job."""
    jobs = {
        job.id: job
        for job in session.execute(
            select(JobRow.id, JobRow.status, JobRow.expires_at, JobRow.event_number)
            .where(JobRow.id.in_({lease.job_id for lease in leases}))
            .order_by(JobRow.id)
            .with_for_update(key_share=True)
        )
    }
    requests = {
        (request.job_id, request.request_index): request
        for request in session.execute(
            select(
                Request.job_id,
                Request.request_index,
                Request.status,
                Request.lease_owner,
                Request.lease_number,
                Request.expires_at,
            )
            .where(is_request({lease.key for lease in leases}))
            .order_by(Request.job_id, Request.request_index)
            .with_for_update(key_share=True)
        )
    }
    now = database_now(session)
    states = {
        lease: _lease_state(lease, worker_id, jobs.get(lease.job_id), requests.get(lease.key), now) for lease in leases
    }
    return states, {job_id: job.event_number + 1 for job_id, job in jobs.items()}


def _lease_state(lease: Lease, worker_id: str, job: AnyRow | None, request: AnyRow | None, now: float) -> _LeaseState:
    if job is None or request is None or (request.lease_owner, request.lease_number) != (worker_id, lease.number):
        return _LeaseState.LOST
    if request.status in ("completed", "failed"):
        return _LeaseState.ENDED
    if request.status != "running" or (request.expires_at is not None and request.expires_at <= now):
        return _LeaseState.LOST
    if job.status == "cancelling":
        return _LeaseState.CANCELLED
    return _LeaseState.HELD if job.status == "in_progress" and job.expires_at > now else _LeaseState.LOST


def _keys(states: dict[Lease, _LeaseState], wanted: _LeaseState) -> set[RequestKey]:
    return {lease.key for lease, state in states.items() if state is wanted}


def _renew(session: Session, keys: Collection[RequestKey], until: float) -> None:
    if keys:
        session.execute(update(Request).where(is_request(keys)).values(lease_expires_at=until))


def _clear_suspects(session: Session, worker_id: str, keys: Collection[RequestKey], now: float) -> None:
    """Clear requests that have committed tokens under this lease, and note that the worker serves requests."""
    if not keys:
        return
    cleared = {
        "proven": True,
        "suspect_group": None,
        "lone_crashes": 0,
        "lone_served": False,
        "lone_host": None,
    }
    newly = update(Request).where(is_request(keys), ~Request.proven).values(**cleared).returning(Request.job_id)
    job_id = session.scalar(newly)
    if job_id is None:
        return
    model = select(JobRow.model).where(JobRow.id == job_id).scalar_subquery()
    served = insert_into(session, Served).values(worker_id=worker_id, model=model, last_at=now)
    session.execute(served.on_conflict_do_update(index_elements=["worker_id"], set_={"last_at": now}))


def _write_plans(session: Session, progress: Iterable[RequestProgress]) -> None:
    rows = [
        {"job_id": entry.lease.job_id, "request_index": entry.lease.request_index, **asdict(entry.plan)}
        for entry in progress
        if entry.plan is not None
    ]
    if rows:
        session.execute(update(Request), rows)


def _write_checkpoints(
    session: Session,
    worker_id: str,
    progress: Iterable[RequestProgress],
    now: float,
    numbers: Mapping[str, int],
    counts: _JobCounts,
) -> None:
    rows = [
        {
            "job_id": entry.lease.job_id,
            "request_index": entry.lease.request_index,
            "worker_id": worker_id,
            "committed_at": now,
            "event_number": numbers[entry.lease.job_id],
            **_checkpoint_columns(checkpoint),
        }
        for entry in progress
        for checkpoint in entry.checkpoints
    ]
    if not rows:
        return
    keys = (Partial.job_id, Partial.request_index, Partial.choice_index, Partial.seq)
    written = {tuple(key) for key in session.execute(insert_or_ignore(session, Partial).returning(*keys), rows)}
    for row in rows:
        if tuple(row[key.key] for key in keys) in written:
            counts.changed.add(row["job_id"])
            counts.completion_tokens[row["job_id"]] += len(row["token_ids"])


def _checkpoint_columns(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "choice_index": checkpoint.choice_index,
        "seq": checkpoint.seq,
        "token_ids": checkpoint.token_ids,
        "accepted": checkpoint.accepted,
        "text": storable(checkpoint.text),
        "pieces": [(storable(text), source) for text, source in checkpoint.pieces],
        "steps": [],
        "step_columns": checkpoint.steps.to_json(),
        "logprobs": checkpoint.logprobs,
    }


def _write_outputs(
    session: Session,
    worker_id: str,
    progress: Iterable[RequestProgress],
    numbers: Mapping[str, int],
    counts: _JobCounts,
) -> None:
    """Move the checkpoints of finished choices into outputs and step rows."""
    finished = {(*entry.lease.key, choice.choice_index): choice for entry in progress for choice in entry.finished}
    if not finished:
        return
    partials = _take_partials(session, finished)
    rows = [
        {**_output_row(key, choice, partials.get(key, []), worker_id), "event_number": numbers[key[0]]}
        for key, choice in finished.items()
    ]
    keys = (ChoiceOutput.job_id, ChoiceOutput.request_index, ChoiceOutput.choice_index)
    written = {tuple(key) for key in session.execute(insert_or_ignore(session, ChoiceOutput).returning(*keys), rows)}
    steps = {key: _steps(partials.get(key, [])) for key in finished if key in written}
    _insert_steps(session, steps)
    rollups.add_steps(session, [(key[0], parts) for key, parts in steps.items()])
    _count_outputs(finished, written, partials, counts)


def _take_partials(session: Session, keys: Collection[ChoiceKey]) -> dict[ChoiceKey, list[AnyRow]]:
    """Delete the checkpoints of these choices and return them by choice, in order."""
    key = (Partial.job_id, Partial.request_index, Partial.choice_index, Partial.seq)
    content = (
        Partial.token_ids,
        Partial.accepted,
        Partial.text,
        Partial.pieces,
        Partial.steps,
        Partial.step_columns,
        Partial.logprobs,
        Partial.worker_id,
        Partial.event_number,
    )
    taken = session.execute(delete(Partial).where(is_one_of(key[:3], keys)).returning(*key, *content))
    ordered = sorted(taken, key=lambda partial: (*_choice_key(partial), partial.seq))
    return {key: list(group) for key, group in groupby(ordered, key=_choice_key)}


def _choice_key(partial: AnyRow) -> ChoiceKey:
    return (partial.job_id, partial.request_index, partial.choice_index)


_CHOICE_COLUMNS = tuple(column.name for column in fields(FinishedChoice))


def _output_row(key: ChoiceKey, choice: FinishedChoice, partials: Sequence[AnyRow], worker_id: str) -> dict[str, Any]:
    job_id, request_index, _ = key
    return {
        "job_id": job_id,
        "request_index": request_index,
        **{name: getattr(choice, name) for name in _CHOICE_COLUMNS},  # asdict() would copy each token
        "text": storable(choice.text),
        "accepted_tokens": sum(sum(partial.accepted) for partial in partials),
        "pieces": merge_pieces(piece for partial in partials for piece in partial.pieces),
        "logprobs": _all_logprobs(partials),
        "worker_id": worker_id,
        "checkpoints": [
            (partial.event_number, partial.seq, len(partial.text), len(partial.token_ids), sum(partial.accepted))
            for partial in partials
        ],
    }


def _all_logprobs(partials: Sequence[AnyRow]) -> list[Any] | None:
    """Return the logprobs of all checkpoints, of all owners; None if the request wants none."""
    parts = [partial.logprobs for partial in partials]
    return None if not parts or None in parts else [row for part in parts for row in part]


def merge_pieces(pieces: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Join adjacent pieces of the same source."""
    return [
        ("".join(text for text, _ in group), source) for source, group in groupby(pieces, key=lambda piece: piece[1])
    ]


def _steps(partials: Iterable[AnyRow]) -> list[tuple[str, StepColumns]]:
    """Return the steps of a choice in commit order, by worker: each owner's are one part."""
    parts: list[tuple[str, StepColumns]] = []
    for partial in partials:
        steps = stored_steps(partial.step_columns, partial.steps)
        if parts and parts[-1][0] == partial.worker_id:
            parts[-1][1].extend(steps)
        elif len(steps):
            parts.append((partial.worker_id, steps))
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
    partials: dict[ChoiceKey, list[AnyRow]],
    counts: _JobCounts,
) -> None:
    """Replace the counted tokens of checkpoints by those of their outputs."""
    for key, choice in finished.items():
        job_id, _, _ = key
        counts.completion_tokens[job_id] -= sum(len(partial.token_ids) for partial in partials.get(key, []))
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
        ended = {"status": "completed", "finished_at": now, "lease_expires_at": None, "event_number": numbers[job_id]}
        of_job = {key for key in completed if key[0] == job_id}
        session.execute(update(Request).where(is_request(of_job)).values(**ended))
    if failed:
        rows = [_failed_row(key, failure, now, numbers[key[0]]) for key, failure in failed.items()]
        session.execute(update(Request), rows)


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
    session.connection().execute(
        update(JobRow)
        .where(JobRow.id == bindparam("job"))
        .values(
            requests_completed=JobRow.requests_completed + bindparam("completed"),
            requests_failed=JobRow.requests_failed + bindparam("failed"),
            prompt_tokens=JobRow.prompt_tokens + bindparam("prompt"),
            completion_tokens=JobRow.completion_tokens + bindparam("completion"),
            event_number=JobRow.event_number + bindparam("new_event"),
        ),
        rows,
    )
