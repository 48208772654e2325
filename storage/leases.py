"""Leases: claim queued requests for a worker, release them, and find jobs whose workers must be notified.

`lease_number` is a fencing token: it grows with every claim, and writes under an older number match no row. Leases are
renewed by the worker's flush (storage.progress.flush), not by a thread, so an engine that hangs loses its leases.
A claim reads columns by the connection: through the session it would take a quarter longer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Final

from sqlalchemy import ColumnElement, Float, Select, Update, and_, bindparam, case, func, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from storage.cached_answers import CacheScope, Repeats, claimed_scope
from storage.dialect import (
    AnyRow,
    database_now,
    has_keys,
    has_room,
    has_served,
    is_one_of,
    is_serving,
    key_parameters,
    running_requests,
)
from storage.fair_share import Ageing, FairShare, JobShare
from storage.models import ChoiceOutput, JobRow, Partial, Request
from storage.pilots import has_claimable, may_run
from storage.records import Checkpoint, Claim, Lease, RequestKey, RequestPlan
from storage.steps.columns import stored_steps
from storage.transitions import cancel_requests, end_finished_jobs, lock_jobs, locked_jobs, return_requests

_PASSED_OVER: Final = 16  # jobs that a claim considers beyond its slots

_CLAIMED: Final = (
    Request.job_id,
    Request.request_index,
    Request.lease_number,
    Request.custom_id,
    Request.body,
    Request.attempts,
    Request.started_at,
    Request.answer_format,
    Request.sampling_defaults,
    Request.identity,
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
    ageing: Ageing | None = None,
    repeats: Repeats | None = None,
) -> list[Claim]:
    """Claim up to `limit` queued requests of a model; return them with the checkpoints of earlier owners.

    Interactive requests (`priority` 1) come first, and the last `reserved` slots are for them alone. The others are
    divided between classes, owners and jobs by storage.fair_share; `ageing` is the caller's memory of earlier claims.
    Paused jobs are skipped, and so are jobs that run `max_concurrent` requests. Requests in `holding`, which the caller
    is decoding, are not claimed again even if their leases have lapsed. Jobs with bodies newer than `body_version` are
    skipped. Requests whose answers can be copied, or are being computed, are left to `repeats`; None: none are.

    Suspects (storage.lease_recovery) come first, one quarantine group at a time, and only when everything that the
    caller holds is cleared. Until the group is cleared as well, the worker claims nothing else, so a crash has a known
    set of suspects. A worker that has not served any request yet claims requests that have crashed a lone worker
    last. If it crashes on other work first, its host is at fault. If not, a later crash counts against the request.
    """
    if limit <= 0:
        return []
    now = database_now(session)
    if repeats is not None:
        repeats.begin()
    held = _held(session, worker_id, holding)
    if any(row.suspect_group is not None and not row.proven for row in held):
        return []
    may_serve = {"model": model, "now": now, "body_version": body_version}
    group, crashed_alone = _next_group(session, may_serve)
    taken: list[RequestKey] = []
    if group is None or (crashed_alone and not has_served(session, worker_id)):
        taken = _claim_fairly(session, may_serve, limit, holding, None, repeats)
        rest = limit - reserved - len(taken)
        taken += _claim_fairly(session, may_serve, rest, holding, ageing or Ageing(), repeats)
    if group is not None and not taken and all(row.proven for row in held):
        taken = _claim_group(session, may_serve, group, limit, holding)
    scope = None if repeats is None else repeats.scope
    return _as_claims(session, _own(session, worker_id, taken, now, lease_s, scope))


def release(session: Session, worker_id: str, leases: Iterable[Lease]) -> None:
    """Return requests to the queue. The attempt does not count; committed checkpoints stay."""
    leases = list(leases)
    if not leases:
        return
    jobs = lock_jobs(session, JobRow.id.in_({lease.job_id for lease in leases}))
    cancelling = set(session.scalars(select(JobRow.id).where(JobRow.id.in_(jobs), JobRow.status == "cancelling")))
    columns = (Request.job_id, Request.request_index, Request.lease_number)
    mine = is_one_of(columns, [(*lease.key, lease.number) for lease in leases])
    released = return_requests(session, and_(mine, Request.lease_owner == worker_id))
    cancel_requests(session, {key for key in released if key[0] in cancelling}, database_now(session))
    end_finished_jobs(session, cancelling)


def jobs_to_notify(session: Session, older_than_s: float) -> list[tuple[str, str]]:
    """Return (job_id, model) of one job per model with queued requests and no notification for `older_than_s`.

    Sets `doorbell_at` of all such jobs. One notification per model is enough: workers claim from any job.
    """
    now = database_now(session)
    overdue = or_(JobRow.doorbell_at.is_(None), JobRow.doorbell_at < now - older_than_s)
    waiting = lock_jobs(session, and_(is_serving(), overdue, has_claimable()))
    if not waiting:
        return []
    notified = session.execute(
        update(JobRow).where(JobRow.id.in_(waiting)).values(doorbell_at=now).returning(JobRow.model, JobRow.id)
    )
    one_per_model = dict(notified.all())
    return [(job_id, model) for model, job_id in one_per_model.items()]


def _may_serve() -> ColumnElement[bool]:
    """Return the condition that a worker may serve a job; parameters: `model`, `now`, `body_version`."""
    return and_(
        is_serving(),
        JobRow.model == bindparam("model"),
        JobRow.expires_at > bindparam("now"),
        JobRow.body_version <= bindparam("body_version"),
    )


def _next_group(session: Session, may_serve: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the next quarantine group and whether it has crashed a worker alone. Such groups come last."""
    found = session.connection().execute(_groups(), may_serve).first()
    return (None, False) if found is None else (found[0], bool(found[1]))


@cache  # a worker claims all the time, and building a statement takes longer than executing it
def _groups() -> Select[str | None, bool]:
    crashed_alone = Request.lone_crashes > 0
    return (
        select(Request.suspect_group, crashed_alone)
        .join(JobRow, JobRow.id == Request.job_id)
        .where(Request.suspect_group.is_not(None), Request.status == "queued", _may_serve(), has_room())
        .order_by(crashed_alone, Request.suspect_group)
        .limit(1)
    )


def _held(session: Session, worker_id: str, holding: Collection[RequestKey]) -> Sequence[AnyRow]:
    """Return `suspect_group` and `proven` of the requests that the caller still owns."""
    if not holding:
        return ()
    jobs, parameters = key_parameters(holding)
    return session.connection().execute(_held_by(jobs), {**parameters, "worker": worker_id}).all()


@lru_cache(maxsize=64)
def _held_by(jobs: int) -> Select[str | None, bool]:
    mine = (has_keys(jobs), Request.lease_owner == bindparam("worker"), Request.status == "running")
    return select(Request.suspect_group, Request.proven).where(*mine)


def _claim_fairly(
    session: Session,
    may_serve: Mapping[str, Any],
    limit: int,
    holding: Collection[RequestKey],
    ageing: Ageing | None,
    repeats: Repeats | None,
) -> list[RequestKey]:
    """Lock up to `limit` queued requests by fair share, and set `started_at` of their jobs. None: interactive ones."""
    if limit <= 0:
        return []
    most = limit if repeats is None else limit + _PASSED_OVER  # all requests of a job may be left out
    fair_share = FairShare(_job_shares(session, may_serve, most, interactive=ageing is None), ageing)
    locked = _lock_claimed(session, fair_share.job_ids)
    for job_id, room in _room(session, locked).items():
        fair_share.set_room(job_id, room)
    taken: list[RequestKey] = []
    while len(taken) < limit and (shares := fair_share.allocate(limit - len(taken))):
        for job_id, slots in shares.items():
            got = _take(session, None, job_id, slots, [*holding, *taken], repeats, wait=ageing is not None)
            taken += got
            fair_share.add_running(job_id, len(got))
            if len(got) < slots:  # other workers have locked the rest, or the caller holds it
                fair_share.remove(job_id)
    _start(session, may_serve, {job_id for job_id, _ in taken}.intersection(locked))
    return taken


def _lock_claimed(session: Session, job_ids: Collection[str]) -> list[str]:
    """Lock those jobs that have not started, or whose running requests must be counted; return their ids.

    Lock order is jobs before requests, by id (storage.transitions). Mostly no job must be locked.
    """
    if not job_ids:
        return []
    return list(session.connection().scalars(_claimed_jobs(), {"jobs": list(job_ids)}))


@cache
def _claimed_jobs() -> Select[str]:
    counted = JobRow.started_at.is_(None) | JobRow.max_concurrent.is_not(None)
    return locked_jobs(JobRow.id.in_(bindparam("jobs", expanding=True)) & counted)


def _room(session: Session, locked: Collection[str]) -> dict[str, int]:
    """Return how many more requests each of these locked jobs may run; jobs without a limit are left out.

    A paused job has none: it may have been paused until it was locked.
    """
    return dict(session.connection().execute(_rooms(), {"jobs": list(locked)}).all()) if locked else {}


@cache
def _rooms() -> Select[str, int]:
    running = and_(Request.job_id == JobRow.id, Request.status == "running")
    count = select(func.count()).where(running).correlate(JobRow).scalar_subquery()
    limited = or_(JobRow.max_concurrent.is_not(None), JobRow.paused_at.is_not(None))
    room = case((JobRow.paused_at.is_not(None), 0), else_=JobRow.max_concurrent - count)
    return select(JobRow.id, room).where(JobRow.id.in_(bindparam("jobs", expanding=True)), limited)


def _start(session: Session, may_serve: Mapping[str, Any], job_ids: Collection[str]) -> None:
    """Set `started_at` of those locked jobs that have none."""
    if job_ids:
        session.connection().execute(_starting(), {"jobs": list(job_ids), "started": may_serve["now"]})


@cache
def _starting() -> Update:
    unstarted = and_(JobRow.id.in_(bindparam("jobs", expanding=True)), JobRow.started_at.is_(None))
    return update(JobRow).where(unstarted).values(started_at=bindparam("started"))


def _claim_group(
    session: Session, may_serve: Mapping[str, Any], group: str, limit: int, holding: Collection[RequestKey]
) -> list[RequestKey]:
    """Lock up to `limit` queued requests of a quarantine group, of jobs that may run more."""
    jobs = session.scalars(_jobs_of_group(), {**may_serve, "group": group}).all()
    room = _room(session, _lock_claimed(session, jobs))
    taken: list[RequestKey] = []
    for job_id in sorted(jobs):
        slots = min(limit - len(taken), max(0, room.get(job_id, limit)))
        if slots > 0:
            taken += _take(session, group, job_id, slots, holding, None)
    return taken


@cache
def _jobs_of_group() -> Select[str]:
    members = select(Request.job_id).where(Request.suspect_group == bindparam("group"), Request.status == "queued")
    return select(JobRow.id).where(JobRow.id.in_(members), _may_serve())


def _job_shares(session: Session, may_serve: Mapping[str, Any], limit: int, *, interactive: bool) -> list[JobShare]:
    """Return the jobs of each class that come first for `limit` slots, of those with queued requests.

    Ties are broken at random. By age, the oldest jobs would take every slot while there are fewer slots than jobs.
    """
    rows = session.connection().execute(_shares(interactive=interactive), {**may_serve, "limit": limit})
    return [JobShare(job_id, owner, running, int(owners), rank) for job_id, owner, running, owners, rank in rows]


@cache
def _shares(*, interactive: bool) -> Select[Any]:
    wanted = JobRow.priority > 0 if interactive else JobRow.priority == 0
    job = (
        select(
            JobRow.id,
            JobRow.api_key_id.label("owner"),
            running_requests(bindparam("now")).label("running"),
            and_(has_claimable(), has_room()).label("waits"),
            JobRow.priority_class.label("rank"),
        )
        .where(_may_serve(), wanted)
        .subquery()
    )
    owners_running = func.sum(job.c.running).over(partition_by=job.c.owner).label("owner_running")
    owned = select(job, owners_running).subquery()
    same = (owned.c.owner, owned.c.rank)
    place = func.row_number().over(partition_by=same, order_by=(owned.c.running, func.random()))
    turn = select(owned, (owned.c.owner_running + place).label("turn")).where(owned.c.waits).subquery()
    order = func.row_number().over(partition_by=turn.c.rank, order_by=(turn.c.turn, func.random()))
    ordered = select(turn, order.label("order")).subquery()
    columns = (ordered.c.id, ordered.c.owner, ordered.c.running, ordered.c.owner_running, ordered.c.rank)
    return select(*columns).where(ordered.c.order <= bindparam("limit")).order_by(ordered.c.order)


def _take(
    session: Session,
    group: str | None,
    job_id: str,
    limit: int,
    exclude: Collection[RequestKey],
    repeats: Repeats | None,
    *,
    wait: bool = True,
) -> list[RequestKey]:
    """Lock queued requests of a job, or of its part of a quarantine group, without those that are left to `repeats`."""
    if repeats is None:
        rows = _lock_queued(session, group, job_id, limit, exclude, None)
        return [(row.job_id, row.request_index) for row in rows]
    taken: list[RequestKey] = []
    while len(taken) < limit:
        rows = _lock_queued(session, group, job_id, limit - len(taken), [*exclude, *taken], repeats.allowed())
        computed = repeats.left_over(session, rows, wait=wait)
        taken += computed
        if len(computed) == len(rows) or repeats.full:
            break
    return taken


def _lock_queued(
    session: Session,
    group: str | None,
    job_id: str,
    limit: int,
    exclude: Collection[RequestKey],
    allowed: ColumnElement[bool] | None,
) -> Sequence[AnyRow]:
    """Lock queued requests of a job, skipping those that other workers have locked: of a quarantine group, or of none.

    Those of none may have to wait for the pilot of the job. `allowed` is a further condition.
    """
    _, parameters = key_parameters(key for key in exclude if key[0] == job_id)
    given = {"job": job_id, "limit": limit, **parameters} | ({} if group is None else {"group": group})
    query = _queued(grouped=group is not None, excluding=bool(parameters))
    return session.connection().execute(query if allowed is None else query.where(allowed), given).all()


@cache
def _queued(*, grouped: bool, excluding: bool) -> Select[*tuple[Any, ...]]:
    unsuspected = and_(Request.suspect_group.is_(None), may_run())
    wanted = Request.suspect_group == bindparam("group") if grouped else unsuspected
    query = select(Request.job_id, Request.request_index, Request.identity, Request.lease_number)
    query = query.where(Request.job_id == bindparam("job"), wanted, Request.status == "queued")
    if excluding:
        query = query.where(~has_keys(1))
    query = query.order_by(Request.job_id, Request.request_index).limit(bindparam("limit"))
    return query.with_for_update(skip_locked=True)


def _own(
    session: Session,
    worker_id: str,
    keys: Sequence[RequestKey],
    now: float,
    lease_s: float,
    scope: CacheScope | None,
) -> Sequence[AnyRow]:
    """Give locked requests to the worker under new leases; return them in the order of `keys`."""
    if not keys:
        return ()
    jobs, parameters = key_parameters(keys)
    named = None if scope is None else scope.name
    given = {**parameters, "worker": worker_id, "now": now, "until": now + lease_s, "scope": named}
    rows = session.connection().execute(_owning(jobs), given).all()
    order = {key: number for number, key in enumerate(keys)}
    return sorted(rows, key=lambda row: order[row.job_id, row.request_index])


@lru_cache(maxsize=64)
def _owning(jobs: int) -> ReturningUpdate[Any]:
    return (
        update(Request)
        .where(has_keys(jobs))
        .values(
            status="running",
            attempts=Request.attempts + 1,
            lease_owner=bindparam("worker"),
            lease_number=Request.lease_number + 1,
            lease_expires_at=bindparam("until"),
            started_at=func.coalesce(Request.started_at, bindparam("now", type_=Float())),
            proven=False,
            cache_scope=claimed_scope(),
        )
        .returning(*_CLAIMED)
    )


def _as_claims(session: Session, taken: Collection[AnyRow]) -> list[Claim]:
    """Return the claimed requests with the checkpoints and finished choices of earlier owners."""
    if not taken:
        return []
    keys = {(row.job_id, row.request_index) for row in taken}
    jobs = {
        job.id: job for job in session.connection().execute(_jobs_of_claims(), {"jobs": list({job for job, _ in keys})})
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
            plan=RequestPlan(row.answer_format, row.sampling_defaults),
            max_concurrent=jobs[row.job_id].max_concurrent,
            verifies=jobs[row.job_id].verification_of is not None,
            identity=row.identity,
        )
        for row in taken
    ]


@cache
def _jobs_of_claims() -> Select[Any]:
    columns: tuple[Any, ...] = (
        JobRow.id,
        JobRow.endpoint,
        JobRow.priority,
        JobRow.traceparent,
        JobRow.max_concurrent,
        JobRow.verification_of,
    )
    return select(*columns).where(JobRow.id.in_(bindparam("jobs", expanding=True)))


def _checkpoints(session: Session, keys: Collection[RequestKey]) -> Mapping[RequestKey, list[Checkpoint]]:
    jobs, parameters = key_parameters(keys)
    found: defaultdict[RequestKey, list[Checkpoint]] = defaultdict(list)
    for row in session.connection().execute(_checkpoints_of(jobs), parameters):
        found[row.job_id, row.request_index].append(_checkpoint(row))
    return found


@lru_cache(maxsize=64)
def _checkpoints_of(jobs: int) -> Select[Any]:
    return (
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
            Partial.step_columns,
        )
        .where(has_keys(jobs, Partial.job_id, Partial.request_index))
        .order_by(Partial.job_id, Partial.request_index, Partial.choice_index, Partial.seq)
    )


def _checkpoint(row: AnyRow) -> Checkpoint:
    return Checkpoint(
        choice_index=row.choice_index,
        seq=row.seq,
        token_ids=tuple(row.token_ids),
        accepted=tuple(row.accepted),
        text=row.text,
        pieces=tuple((text, source) for text, source in row.pieces),
        steps=stored_steps(row.step_columns, row.steps),
    )


def _finished_choices(session: Session, keys: Collection[RequestKey]) -> Mapping[RequestKey, list[int]]:
    jobs, parameters = key_parameters(keys)
    found: defaultdict[RequestKey, list[int]] = defaultdict(list)
    for job_id, request_index, choice_index in session.connection().execute(_choices_of(jobs), parameters):
        found[job_id, request_index].append(choice_index)
    return found


@lru_cache(maxsize=64)
def _choices_of(jobs: int) -> Select[str, int, int]:
    return (
        select(ChoiceOutput.job_id, ChoiceOutput.request_index, ChoiceOutput.choice_index)
        .where(has_keys(jobs, ChoiceOutput.job_id, ChoiceOutput.request_index))
        .order_by(ChoiceOutput.choice_index)
    )
