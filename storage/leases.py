"""Ownership: who may work on a request, and for how long. Claim, hand back, and wake those who could claim.

A lease carries a number that grows with every claim; whoever writes with an older one matches no row. Renewing is part
of the flush, and so is a sign of life: no thread renews for an engine that hangs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import (
    AnyRow,
    database_now,
    has_queued_requests,
    has_served,
    is_one_of,
    is_request,
    running_requests,
)
from storage.fair_share import FairShare, JobShare
from storage.models import Job, Output, Partial, Request
from storage.records import Checkpoint, Claim, Lease, RequestKey, StepRow, known_step_columns
from storage.transitions import cancel_requests, end_finished_jobs, lock_jobs

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
    body_version: int = 1,
) -> list[Claim]:
    """Take up to `limit` queued requests of a model, with what earlier owners had committed of them.

    Owners and their jobs get fair shares (storage.fair_share). Requests that a person waits for come first; the last
    `reserved` places are for them alone. `holding` are requests that the caller is
    working on; it does not get them again, whatever has become of its lease. Jobs whose bodies are newer than
    `body_version` are left to others.

    Suspects (storage.lease_recovery) come first, a group at a time, and only when all that the caller holds is proven;
    until they are proven too, nothing joins them. A worker that has not served anything yet takes accused ones last:
    if it dies of other work too, the host is bad, and if it does not, its death will tell something.
    """
    if limit <= 0:
        return []
    now = database_now(session)
    held = _held(session, worker_id, holding)
    if any(row.suspect_group is not None and not row.proven for row in held):
        return []
    may_serve = and_(
        Job.status == "in_progress", Job.model == model, Job.expires_at > now, Job.body_version <= body_version
    )
    group, accused = _next_group(session, may_serve)
    taken: list[RequestKey] = []
    if group is None or (accused and not has_served(session, worker_id)):
        taken = _claim_fairly(session, and_(may_serve, Job.priority > 0), limit, now, holding)
        rest = limit - reserved - len(taken)
        taken += _claim_fairly(session, and_(may_serve, Job.priority == 0), rest, now, holding)
    if group is not None and not taken and all(row.proven for row in held):
        taken = _lock_queued(session, Request.suspect_group == group, limit, holding)
    return _as_claims(session, _own(session, worker_id, taken, now, lease_s))


def release(session: Session, worker_id: str, leases: Iterable[Lease]) -> None:
    """Hand requests back unfinished, in order: this attempt does not count, and what is committed of them stays."""
    leases = list(leases)
    if not leases:
        return
    jobs = lock_jobs(session, Job.id.in_({lease.job_id for lease in leases}))
    cancelling = set(session.scalars(select(Job.id).where(Job.id.in_(jobs), Job.status == "cancelling")))
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
    end_finished_jobs(session, cancelling)


def jobs_to_notify(session: Session, older_than_s: float) -> list[tuple[str, str]]:
    """Return (job_id, model) of a job a model with work that nobody was told of for so long; note that all are rung.

    One doorbell is enough for all jobs of a model: workers look for any.
    """
    now = database_now(session)
    silent = or_(Job.doorbell_at.is_(None), Job.doorbell_at < now - older_than_s)
    unheard = lock_jobs(session, and_(Job.status == "in_progress", silent, has_queued_requests()))
    if not unheard:
        return []
    rung = session.execute(update(Job).where(Job.id.in_(unheard)).values(doorbell_at=now).returning(Job.model, Job.id))
    one_a_model = dict(rung.all())
    return [(job_id, model) for model, job_id in one_a_model.items()]


def _next_group(session: Session, may_serve: ColumnElement[bool]) -> tuple[str | None, bool]:
    """Return the suspects that are tried next, and whether a worker has died of them alone. Those come last."""
    accused = Request.lone_crashes > 0
    found = session.execute(
        select(Request.suspect_group, accused)
        .join(Job, Job.id == Request.job_id)
        .where(Request.suspect_group.is_not(None), Request.status == "queued", may_serve)
        .order_by(accused, Request.suspect_group)
        .limit(1)
    ).first()
    return (None, False) if found is None else (found[0], bool(found[1]))


def _held(session: Session, worker_id: str, holding: Collection[RequestKey]) -> Sequence[AnyRow]:
    """Return how far those that the caller still owns are proven."""
    if not holding:
        return ()
    mine = (is_request(holding), Request.lease_owner == worker_id, Request.status == "running")
    return session.execute(select(Request.suspect_group, Request.proven).where(*mine)).all()


def _claim_fairly(
    session: Session, may_serve: ColumnElement[bool], limit: int, now: float, holding: Collection[RequestKey]
) -> list[RequestKey]:
    """Lock up to `limit` queued requests, fair between owners and their jobs, and say of those jobs that they began."""
    if limit <= 0:
        return []
    turns = FairShare(_job_shares(session, may_serve, limit, now))
    # Jobs before requests, in order: whoever locks several does so. Mostly there is nothing to write.
    waiting = lock_jobs(session, Job.id.in_(turns.job_ids) & Job.started_at.is_(None)) if turns.job_ids else []
    taken: list[RequestKey] = []
    while len(taken) < limit and (shares := turns.allocate(limit - len(taken))):
        for job_id, places in shares.items():
            unsuspected = and_(Request.job_id == job_id, Request.suspect_group.is_(None))
            got = _lock_queued(session, unsuspected, places, [*holding, *taken])
            taken += got
            turns.took(job_id, len(got))
            if len(got) < places:  # the rest is locked by others who claim right now, or held by the caller
                turns.leave(job_id)
    begun = {job_id for job_id, _ in taken}.intersection(waiting)
    if begun:
        session.execute(update(Job).where(Job.id.in_(begun)).values(started_at=now))
    return taken


def _job_shares(session: Session, may_serve: ColumnElement[bool], limit: int, now: float) -> list[JobShare]:
    """Return the jobs that come first for `limit` places, of those that have something to claim.

    Among equals lots decide: were it age, an old job would win every place as long as there are fewer than jobs.
    """
    job = (
        select(
            Job.id,
            Job.api_key_id.label("owner"),
            running_requests(now).label("running"),
            has_queued_requests().label("waits"),
        )
        .where(may_serve)
        .subquery()
    )
    owners_running = func.sum(job.c.running).over(partition_by=job.c.owner).label("owner_running")
    owned = select(job, owners_running).subquery()
    in_turn = func.row_number().over(partition_by=owned.c.owner, order_by=(owned.c.running, func.random()))
    turn = select(owned, (owned.c.owner_running + in_turn).label("turn")).where(owned.c.waits).subquery()
    rows = session.execute(
        select(turn.c.id, turn.c.owner, turn.c.running, turn.c.owner_running)
        .order_by(turn.c.turn, func.random())
        .limit(limit)
    )
    return [JobShare(job_id, owner, running, int(owner_running)) for job_id, owner, running, owner_running in rows]


def _lock_queued(
    session: Session, condition: ColumnElement[bool], limit: int, but: Collection[RequestKey]
) -> list[RequestKey]:
    """Lock queued requests that meet the condition, passing over those that somebody else is claiming right now."""
    query = select(Request.job_id, Request.request_index).where(condition, Request.status == "queued")
    if but:
        query = query.where(~is_request(but))
    query = query.order_by(Request.job_id, Request.request_index).limit(limit).with_for_update(skip_locked=True)
    return [(job_id, index) for job_id, index in session.execute(query)]


def _own(session: Session, worker_id: str, keys: Sequence[RequestKey], now: float, lease_s: float) -> Sequence[AnyRow]:
    """Make locked requests the worker's."""
    if not keys:
        return ()
    rows = session.execute(
        update(Request)
        .where(is_request(keys))
        .values(
            status="running",
            attempts=Request.attempts + 1,
            lease_owner=worker_id,
            lease_number=Request.lease_number + 1,
            lease_expires_at=now + lease_s,
            started_at=func.coalesce(Request.started_at, now),
            proven=False,
        )
        .returning(*_CLAIMED)
    )
    place = {key: number for number, key in enumerate(keys)}
    return sorted(rows, key=lambda row: place[row.job_id, row.request_index])


def _as_claims(session: Session, taken: Collection[AnyRow]) -> list[Claim]:
    """Return the claimed requests with what earlier owners had committed of them."""
    if not taken:
        return []
    keys = {(row.job_id, row.request_index) for row in taken}
    jobs = {
        job.id: job
        for job in session.execute(
            select(Job.id, Job.endpoint, Job.priority, Job.traceparent).where(Job.id.in_({job for job, _ in keys}))
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
            traceparent=jobs[row.job_id].traceparent,
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
        steps=tuple(StepRow(**known_step_columns(step)) for step in row.steps),
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
