"""Operations of workers and the API server on the database, each in one transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import Select, and_, func, select

from storage import leases, queries, webhooks, writes
from storage.cached_answers import CACHED, Repeats
from storage.lease_recovery import Reclaimed, reclaim
from storage.models import (
    ChoiceOutput,
    DecodeStep,
    JobRow,
    Partial,
    Request,
    StepBatchSize,
    StepDepth,
    StepExpectation,
    StepMinute,
)
from storage.queries import JobView
from storage.records import (
    Checkpoint,
    Claim,
    FinishedChoice,
    FlushResult,
    Lease,
    NewRequest,
    RequestKey,
    RequestProgress,
)
from storage.session import Database
from storage.steps.columns import StepColumns
from storage.webhooks import EVENT_TYPES, Attempt, NewEndpoint
from tests.factories import a_job, some_requests, some_steps


def record(
    database: Database, job_id: str = "job-1", requests: int | Sequence[NewRequest] = 1, **fields: Any
) -> writes.InsertedJob:
    rows = some_requests(requests) if isinstance(requests, int) else requests
    with database.write() as session:
        return writes.insert_job(session, a_job(job_id, **fields), rows)


def claim(
    database: Database,
    worker: str = "w1",
    limit: int = 1,
    lease_s: float = 30.0,
    model: str = "tiny",
    holding: Sequence[RequestKey] = (),
    body_version: int = 1,
    repeats: Repeats | None = None,
) -> list[Claim]:
    """Requeue lapsed requests, then claim."""
    reclaimed(database)
    with database.write() as session:
        return leases.claim(
            session, worker, model, limit, lease_s, holding=holding, body_version=body_version, repeats=repeats
        )


def reclaimed(database: Database, *dead: str, lapsed: bool = True) -> Reclaimed:
    with database.write() as session:
        return reclaim(session, dead, lapsed=lapsed)


def claim_one(database: Database, worker: str = "w1", lease_s: float = 30.0) -> Claim:
    (claimed,) = claim(database, worker, 1, lease_s)
    return claimed


def flush(
    database: Database,
    worker: str,
    *progress: RequestProgress,
    held: Sequence[Lease] = (),
    lease_s: float = 30.0,
    numerics: str | None = None,
) -> FlushResult:
    with database.write() as session:
        return writes.flush(session, worker, lease_s, progress, held, numerics)


def release(database: Database, worker: str, *leases_: Lease) -> None:
    with database.write() as session:
        leases.release(session, worker, leases_)


def cancel(database: Database, job_id: str = "job-1") -> str | None:
    with database.write() as session:
        return writes.request_cancel(session, job_id)


def expire(database: Database) -> list[tuple[str, str]]:
    with database.write() as session:
        return list(writes.end_jobs(session).jobs)


def view(database: Database, job_id: str = "job-1") -> JobView:
    with database.read() as session:
        found = queries.job(session, job_id)
    assert found is not None
    return found


def tokens_of(seq: int, *emitted: int, choice: int = 0, first: int = 0) -> Checkpoint:
    """A checkpoint of steps that emitted these numbers of tokens; each token is one letter."""
    flags = [flag for count in emitted for flag in [True] * (count - 1) + [False]]
    letters = ["x" if flag else "y" for flag in flags]
    return Checkpoint(
        choice_index=choice,
        seq=seq,
        token_ids=tuple(range(len(flags))),
        accepted=tuple(flags),
        text="".join(letters),
        pieces=tuple(zip(letters, ("draft" if flag else "target" for flag in flags), strict=True)),
        steps=StepColumns.of(some_steps(*emitted, first=first)),
    )


def end_of(*checkpoints: Checkpoint, choice: int = 0) -> FinishedChoice:
    """The end of a choice that consists of these checkpoints."""
    ids = tuple(token for checkpoint in checkpoints for token in checkpoint.token_ids)
    return FinishedChoice(
        choice_index=choice,
        text="".join(checkpoint.text for checkpoint in checkpoints),
        token_ids=ids,
        finish_reason="stop",
        prompt_tokens=5,
        completion_tokens=len(ids),
        started_at=1.0,
        finished_at=2.0,
        last_seq=checkpoints[-1].seq + 1,
        first_of_prompt=choice == 0,
    )


def whole(lease: Lease, *emitted: int) -> RequestProgress:
    """A request of one choice that was decoded between two flushes."""
    checkpoint = tokens_of(1, *emitted)
    return RequestProgress(lease, (checkpoint,), (end_of(checkpoint),), ends=True)


def going_on(claimed: Claim, *emitted: int, ends: bool = False) -> RequestProgress:
    """New tokens of a request of one choice, after those that earlier owners committed."""
    seq = claimed.checkpoints[-1].seq + 1 if claimed.checkpoints else 1
    checkpoint = tokens_of(seq, *emitted, first=1)
    finished = (end_of(*claimed.checkpoints, checkpoint),) if ends else ()
    return RequestProgress(claimed.lease, (checkpoint,), finished, ends=ends)


def requests_of(database: Database, job_id: str = "job-1") -> dict[int, Any]:
    with database.read() as session:
        query = select(*Request.__table__.columns).where(Request.job_id == job_id)
        rows = session.execute(query.order_by(Request.request_index)).all()
    return {row.request_index: row for row in rows}


def everything(database: Database) -> dict[str, list[Any]]:
    """All rows, to assert that nothing has changed."""
    with database.read() as session:
        return {
            model.__tablename__: sorted(map(repr, session.execute(select(*model.__table__.columns))))
            for model in (JobRow, Request, Partial, ChoiceOutput, DecodeStep)
        }


_ROWS = (
    select(*JobRow.__table__.columns),
    select(Request.job_id, Request.request_index, Request.status, Request.event_number),
    select(*ChoiceOutput.__table__.columns),
    select(*DecodeStep.__table__.columns),
    select(Partial.job_id, Partial.request_index, Partial.token_ids),
)


def check_laws(database: Database) -> None:
    """Assert the invariants of the database."""
    with database.read() as session:
        jobs, requests, outputs, steps, partials = (session.execute(query).all() for query in _ROWS)
    for job in jobs:
        counts = Counter(row.status for row in requests if row.job_id == job.id)
        assert job.requests_total == counts.total()
        assert (job.requests_completed, job.requests_failed) == (counts["completed"], counts["failed"])
        ended = job.status in ("completed", "failed", "expired", "cancelled")
        assert ended == (counts["queued"] + counts["running"] == 0)
        assert (job.finished_at is not None) == ended
        written = sum(row.completion_tokens for row in outputs if row.job_id == job.id)
        assert job.completion_tokens == written + sum(len(r.token_ids) for r in partials if r.job_id == job.id)
    for row in requests:  # the end of a request has an event number: readers rely on the order
        assert (row.event_number is None) == (row.status in ("queued", "running"))
    emitted: Counter[tuple[str, int, int]] = Counter()
    for row in steps:
        emitted[row.job_id, row.request_index, row.choice_index] += row.emitted_tokens
    assert emitted == {(row.job_id, row.request_index, row.choice_index): row.completion_tokens for row in outputs}
    check_sums(database)
    completed = {(row.job_id, row.request_index) for row in requests if row.status == "completed"}
    assert completed <= {(row.job_id, row.request_index) for row in outputs}
    assert completed.isdisjoint((row.job_id, row.request_index) for row in partials)


def check_sums(database: Database) -> None:
    """Assert that every rollup equals the sums over `decode_steps`, without the rows of copied answers."""
    pairs, everything_asked = _sums()
    with database.read() as session:
        found = session.execute(everything_asked).one()
    for (asked, _), kept, counted in zip(pairs, found[::2], found[1::2], strict=True):
        assert (kept or 0) == (counted or 0), str(asked)


@cache
def _sums() -> tuple[list[tuple[Select[Any], Select[Any]]], Select[Any]]:
    """Pairs of queries whose sums are equal, and one that asks for all: each step of a law asks."""
    steps_sum = func.coalesce(func.sum(StepMinute.steps + StepMinute.first_steps), 0)
    computed = func.coalesce(DecodeStep.decision, "") != CACHED
    later = and_(DecodeStep.step > 0, computed)
    pairs: list[tuple[Select[Any], Select[Any]]] = [
        (select(steps_sum), select(func.count()).select_from(DecodeStep).where(computed)),
        (
            select(func.sum(StepMinute.tokens + StepMinute.first_tokens)),
            select(func.sum(DecodeStep.emitted_tokens)).where(computed),
        ),
        (select(func.sum(StepMinute.tokens)), select(func.sum(DecodeStep.emitted_tokens)).where(later)),
        (select(func.sum(StepMinute.tree_nodes)), select(func.sum(DecodeStep.tree_nodes)).where(later)),
        (select(func.sum(StepMinute.accepted_tokens)), select(func.sum(DecodeStep.accepted_tokens)).where(later)),
        (select(func.sum(StepBatchSize.tree_nodes)), select(func.sum(DecodeStep.tree_nodes)).where(later)),
        (
            select(func.sum(StepDepth.accepted_tokens * StepDepth.steps)),
            select(func.sum(DecodeStep.accepted_tokens)).where(later),
        ),
        (
            select(func.sum(StepExpectation.accepted_tokens)),
            select(func.sum(DecodeStep.accepted_tokens)).where(DecodeStep.tree_nodes > 0),
        ),
    ]
    return pairs, select(*(query.scalar_subquery() for pair in pairs for query in pair))


def leave_dead(database: Database, job_id: str = "job-1", endpoint_id: str = "wh_1") -> None:
    """Add an endpoint and a job that is cancelled, whose event the endpoint refuses for good."""
    with database.write() as session:
        new = NewEndpoint(endpoint_id, "", "", "https://example.com/hook?token=t", EVENT_TYPES, "whsec_c2VjcmV0")
        webhooks.add_endpoint(session, new)
    record(database, job_id)
    cancel(database, job_id)
    with database.write() as session:
        (claimed,) = webhooks.claim_deliveries(session, 1, 60.0)
        gone = Attempt(410, "Gone", delivered=False, final=True)
        assert webhooks.record_attempt(session, claimed.delivery, gone, 0.0, 3600.0) == "dead"
