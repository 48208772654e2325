"""Ownership: who may work on a request, and for how long. Claim, hand back, and wake those who could claim.

worker.runner -> [leases] -> models.  A lease carries a number that grows with every claim; whoever writes with an older
one matches no row. Renewing is part of the flush.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from storage.endings import cancel_requests, finalise_jobs, lock_jobs
from storage.models import Job, Output, Partial, Request
from storage.records import Checkpoint, Claim, Lease, RequestKey, StepRow
from storage.sql import AnyRow, database_now, has_work, is_lapsed, is_one_of, running_requests

_CLAIMED: Final = (
    Request.job_id,
    Request.request_index,
    Request.lease_number,
    Request.custom_id,
    Request.body,
    Request.attempts,
    Request.started_at,
)


def claim(
    session: Session,
    worker_id: str,
    model: str,
    limit: int,
    lease_s: float,
    *,
    holding: Collection[RequestKey] = (),
    reserved: int = 0,
) -> list[Claim]:
    """Take up to `limit` requests of a model, with what earlier owners had committed of them.

    Free are queued requests, and running ones whose lease has lapsed; those come first, for something of them is
    written. Jobs get their turns: each place goes to the job that has the fewest requests running. Before all others
    come those that a person waits for; the last `reserved` places are for them alone. `holding` are requests that the
    caller is working on; it does not get them again, lapsed or not.
    """
    now = database_now(session)
    taken: list[AnyRow] = []
    for urgent, most in ((Job.priority > 0, limit), (Job.priority == 0, limit - reserved)):
        while len(taken) < most and (running := _running_by_job(session, model, urgent, most, now)):
            got = 0
            for job_id, places in share_out(running, most - len(taken)).items():
                rows = _take(session, worker_id, job_id, places, now, lease_s, holding)
                taken += rows
                got += len(rows)
            if not got:  # what is left is locked by others who claim right now, or held by the caller
                break
    return _as_claims(session, taken)


def release(session: Session, worker_id: str, leases: Iterable[Lease]) -> None:
    """Hand requests back unfinished, in order: this attempt does not count, and what is committed of them stays."""
    leases = list(leases)
    if not leases:
        return
    cancelling = set(lock_jobs(session, Job.id.in_({lease.job_id for lease in leases}) & (Job.status == "cancelling")))
    columns = (Request.job_id, Request.request_index, Request.lease_number)
    mine = is_one_of(columns, [(*lease.key, lease.number) for lease in leases])
    released = session.execute(
        update(Request)
        .where(mine, Request.lease_owner == worker_id, Request.status == "running")
        .values(status="queued", attempts=Request.attempts - 1, lease_owner=None, lease_expires_at=None)
        .returning(Request.job_id, Request.request_index)
    ).all()
    keys = {(row.job_id, row.request_index) for row in released if row.job_id in cancelling}
    cancel_requests(session, keys, database_now(session))
    finalise_jobs(session, cancelling)


def jobs_to_ring(session: Session, older_than_s: float) -> list[tuple[str, str]]:
    """Return (job_id, model) of jobs with work that nobody was told of for so long, and note that they are rung."""
    now = database_now(session)
    silent = or_(Job.doorbell_at.is_(None), Job.doorbell_at < now - older_than_s)
    rung = session.execute(
        update(Job)
        .where(Job.status == "in_progress", silent, has_work(now))
        .values(doorbell_at=now)
        .returning(Job.id, Job.model)
    )
    return [(job_id, model) for job_id, model in rung]


def mark_rung(session: Session, job_id: str) -> None:
    """Note that the doorbell of a job has just been rung."""
    session.execute(update(Job).where(Job.id == job_id).values(doorbell_at=database_now(session)))


def share_out(running: Mapping[str, int], places: int) -> dict[str, int]:
    """Give every place to the job that runs the fewest requests, counting those it was given before.

    Jobs in equal position take turns in the order of the mapping.
    """
    turns = [(count, order, job_id) for order, (job_id, count) in enumerate(running.items())]
    heapq.heapify(turns)
    shares: Counter[str] = Counter()
    for _ in range(places if turns else 0):
        count, order, job_id = turns[0]
        shares[job_id] += 1
        heapq.heapreplace(turns, (count + 1, order, job_id))
    return dict(shares)


def _running_by_job(session: Session, model: str, which: ColumnElement[bool], limit: int, now: float) -> dict[str, int]:
    """Return the jobs that have something to claim, with the number of their running requests; fewest first.

    Among equals lots decide: were it age, an old job would win every place as long as there are fewer than jobs.
    """
    running = running_requests(now).label("running")
    jobs = session.execute(
        select(Job.id, running)
        .where(Job.status == "in_progress", Job.model == model, which, Job.expires_at > now, has_work(now))
        .order_by(running, func.random())
        .limit(limit)
    )
    return dict(jobs.all())


def _take(
    session: Session,
    worker_id: str,
    job_id: str,
    places: int,
    now: float,
    lease_s: float,
    holding: Collection[RequestKey],
) -> Sequence[AnyRow]:
    """Claim up to `places` requests of one job."""
    # The job before its requests: whoever locks both does so in this order. Mostly there is nothing to write.
    session.execute(update(Job).where(Job.id == job_id, Job.started_at.is_(None)).values(started_at=now))
    held = [index for job, index in holding if job == job_id]
    free = _lock_free(session, job_id, is_lapsed(now) & Request.request_index.not_in(held), places)
    free += _lock_free(session, job_id, Request.status == "queued", places - len(free))
    rows = session.execute(
        update(Request)
        .where(Request.job_id == job_id, Request.request_index.in_(free))
        .values(
            status="running",
            attempts=Request.attempts + 1,
            lease_owner=worker_id,
            lease_number=Request.lease_number + 1,
            lease_expires_at=now + lease_s,
            started_at=func.coalesce(Request.started_at, now),
        )
        .returning(*_CLAIMED)
    )
    place = {index: number for number, index in enumerate(free)}
    return sorted(rows, key=lambda row: place[row.request_index])


def _lock_free(session: Session, job_id: str, condition: ColumnElement[bool], limit: int) -> list[int]:
    """Lock requests of a job that meet the condition, passing over those that somebody else is claiming right now."""
    free = (
        select(Request.request_index)
        .where(Request.job_id == job_id, condition)
        .order_by(Request.request_index)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return list(session.scalars(free))


def _as_claims(session: Session, taken: Collection[AnyRow]) -> list[Claim]:
    """Return the claimed requests with what earlier owners had committed of them."""
    if not taken:
        return []
    keys = {(row.job_id, row.request_index) for row in taken}
    jobs = {
        job.id: job
        for job in session.execute(
            select(Job.id, Job.endpoint, Job.priority).where(Job.id.in_({job for job, _ in keys}))
        )
    }
    checkpoints = _checkpoints(session, keys)
    finished = _finished_choices(session, keys)
    return [
        Claim(
            lease=Lease(row.job_id, row.request_index, row.lease_number),
            custom_id=row.custom_id,
            endpoint=jobs[row.job_id].endpoint,
            priority=jobs[row.job_id].priority,
            body=row.body,
            attempts=row.attempts,
            started_at=row.started_at,
            checkpoints=tuple(checkpoints[row.job_id, row.request_index]),
            finished_choices=tuple(finished[row.job_id, row.request_index]),
        )
        for row in taken
    ]


def _checkpoints(session: Session, keys: Collection[RequestKey]) -> Mapping[RequestKey, list[Checkpoint]]:
    rows = session.execute(
        select(
            Partial.job_id,
            Partial.request_index,
            Partial.choice_index,
            Partial.seq,
            Partial.token_ids,
            Partial.accepted,
            Partial.text,
            Partial.pieces,
            Partial.steps,
        )
        .where(is_one_of((Partial.job_id, Partial.request_index), keys))
        .order_by(Partial.job_id, Partial.request_index, Partial.choice_index, Partial.seq)
    )
    found: defaultdict[RequestKey, list[Checkpoint]] = defaultdict(list)
    for row in rows:
        found[row.job_id, row.request_index].append(_checkpoint(row))
    return found


def _checkpoint(row: AnyRow) -> Checkpoint:
    return Checkpoint(
        choice_index=row.choice_index,
        seq=row.seq,
        token_ids=tuple(row.token_ids),
        accepted=tuple(row.accepted),
        text=row.text,
        pieces=tuple((text, source) for text, source in row.pieces),
        steps=tuple(StepRow(**step) for step in row.steps),
    )


def _finished_choices(session: Session, keys: Collection[RequestKey]) -> Mapping[RequestKey, list[int]]:
    rows = session.execute(
        select(Output.job_id, Output.request_index, Output.choice_index)
        .where(is_one_of((Output.job_id, Output.request_index), keys))
        .order_by(Output.choice_index)
    )
    found: defaultdict[RequestKey, list[int]] = defaultdict(list)
    for job_id, request_index, choice_index in rows:
        found[job_id, request_index].append(choice_index)
    return found
