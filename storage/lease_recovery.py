"""Reclaiming: requests whose worker is gone go back to the queue, and one that kills its workers is found and failed.

Nobody can tell from outside which of the requests in flight killed a worker, or whether any did. So they are suspects
and run again in halves, one half at a time (storage.leases sees to that): the half with the guilty one kills its worker
again and is halved again, the others come through.

What has committed tokens since it was claimed is proven: it is no suspect as long as others are not.

A request gets an error row only after deaths that were seen, while it was alone in trial and without a token in
between. A lease that lapsed is no death: a step may take long, and the request only goes back. A host that is bad can't
condemn alone, so one of these must hold as well:

- the deaths were on two hosts;
- one of the workers had served another request before it died;
- nothing else of the model was there to try the host with, and the worker died of it again and again. The more requests
  die alike, the more often it takes: all of them together speak against the host.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, false, func, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, database_now, has_served, is_request
from storage.models import Job, Request, Served, Worker
from storage.records import FailedRequest, RequestFailure, RequestKey
from storage.statuses import ACTIVE_JOB_STATUSES, OPEN_REQUEST_STATUSES
from storage.transitions import end_finished_jobs, fail_requests, lock_jobs

POISON: Final = RequestFailure(
    "poison", "The worker process died twice while this request was the only one on trial.", status_code=500
)

MAX_LONE_CRASHES: Final = 2  # so often may work that was alone in trial cost its worker
_MAX_UNTESTED_CRASHES: Final = 4  # the same on a host that has served nothing, for each request that waits
_LONGEST_WAIT: Final = 5  # claims after which the wait for a late owner grows no more
_ORPHANED_S: Final = 5.0  # a lease that lapsed so long ago, of an owner that renews its others, is one it never knew of


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What a round of reclaiming did."""

    requeued: tuple[tuple[str, str], ...] = ()  # (job_id, model) of jobs that have requests to claim again
    poisoned: tuple[FailedRequest, ...] = ()
    ended_jobs: tuple[tuple[str, str], ...] = ()  # (job_id, final status)


def reclaim(session: Session, dead: Collection[str] = (), *, lapsed: bool = True, patience_s: float = 0.0) -> Reclaimed:
    """Give back the requests of the dead workers and, with `lapsed`, of all that did not renew their leases in time.

    Whoever could not reach the database for a while leaves `lapsed` out for the length of a lease: the owners could not
    renew either, and shall be the first to do so. `dead` are workers whose process is known to have ended; only that
    counts against a request. One that was claimed before waits longer for a late owner, by 1, 3, 7 and then 15 times
    `patience_s`, so that a step longer than a lease comes to its end on some worker.
    """
    now = database_now(session)
    gone = _is_gone(now, dead, lapsed=lapsed, patience_s=patience_s)
    concerned = select(Request.job_id).where(Request.job_id == Job.id, gone).correlate(Job).exists()
    job_ids = lock_jobs(session, and_(Job.status == "in_progress", concerned))
    if not job_ids:
        return Reclaimed()
    rows = _lock(session, job_ids, gone)
    alive = _owners_that_renew(session, now) - set(dead)
    plan = _Plan()
    for owner, owned in _by_owner(rows).items():
        if owner in alive:
            plan.orphans += [row for row in owned if row.lease_expires_at < now - _ORPHANED_S]
            continue
        suspects = plan.suspect(owned, now)
        if owner in dead and len(suspects) == 1 and not suspects[0].proven:
            plan.deaths.append(_lone_crash(session, suspects[0]))
    return _carry_out(session, plan, now)


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker as those see it who look whether its process is still there."""

    worker_id: str
    process: str | None
    hostname: str
    started_at: float
    last_seen_at: float


def running_processes(session: Session) -> list[WorkerProcess]:
    """Return the workers that have not left and that are not known to be lost, or still own requests."""
    owners = (
        select(Request.lease_owner)
        .join(Job, Job.id == Request.job_id)
        .where(Job.status.in_(ACTIVE_JOB_STATUSES), Request.status == "running")
    )
    comparing = select(Job.comparing_by).where(Job.compare_plain > 0, Job.compared_at.is_(None))
    at_work = or_(Worker.id.in_(owners), Worker.id.in_(comparing.where(Job.comparing_by.is_not(None))))
    columns = (Worker.id, Worker.process, Worker.hostname, Worker.started_at, Worker.last_seen_at)
    rows = session.execute(select(*columns).where(Worker.stopped_at.is_(None), or_(Worker.lost_at.is_(None), at_work)))
    return [WorkerProcess(*row) for row in rows]


def mark_lost(session: Session, dead: Collection[str], silent_s: float | None = None) -> None:
    """Note which workers are dead, or have said nothing for so long."""
    now = database_now(session)
    lost: ColumnElement[bool] = Worker.id.in_(dead)
    if silent_s is not None:
        lost |= Worker.last_seen_at < now - silent_s
    unmarked = (Worker.stopped_at.is_(None), Worker.lost_at.is_(None))
    session.execute(update(Worker).where(*unmarked, lost).values(lost_at=now))


@dataclass(frozen=True, slots=True)
class _LoneCrash:
    """A request that was alone in trial when its worker was seen dead, and what is known of such deaths so far."""

    row: AnyRow
    crashes: int  # in a row: a worker that dies while others serve tells more of itself than of the request
    served: bool  # one of the workers had served others
    host: str | None  # of the first that is known
    hosts: int  # that are known to differ, at most 2
    waiting: int  # requests of the model that have not ended

    @property
    def verdict(self) -> RequestFailure | None:
        """Return why the request fails; None: it is tried again."""
        if self.hosts > 1:
            return _poison(MAX_LONE_CRASHES, "These were processes on two hosts.")
        if self.crashes >= MAX_LONE_CRASHES and self.served:
            return _poison(self.crashes, "The host serves other requests.")
        if self.crashes >= _MAX_UNTESTED_CRASHES * self.waiting:
            return _poison(self.crashes, "No other request was served meanwhile, so the fault may be the host's.")
        return None


def _poison(deaths: int, why: str) -> RequestFailure:
    message = POISON.message if deaths <= MAX_LONE_CRASHES else POISON.message.replace("twice", f"{deaths} times")
    return replace(POISON, message=f"{message} {why}")


def _lone_crash(session: Session, row: AnyRow) -> _LoneCrash:
    host = session.scalar(select(Worker.hostname).where(Worker.id == row.lease_owner))
    model = session.scalars(select(Job.model).where(Job.id == row.job_id)).one()
    waiting = session.scalar(
        select(func.count())
        .select_from(Request)
        .join(Job, Job.id == Request.job_id)
        .where(Job.status == "in_progress", Job.model == model, Request.status.in_(OPEN_REQUEST_STATUSES))
    )
    serves = has_served(session, row.lease_owner)
    return _LoneCrash(
        row,
        crashes=1 if not serves and _others_served_since(session, row, model) else row.lone_crashes + 1,
        served=row.lone_served or serves,
        host=row.lone_host or host,
        hosts=2 if row.lone_host and host and row.lone_host != host else 1,
        waiting=waiting or 1,
    )


def _others_served_since(session: Session, row: AnyRow, model: str) -> bool:
    """Return whether a worker has served a request of the model since this one was given back the last time."""
    if row.suspect_group is None:
        return False
    last_at = session.scalar(select(func.max(Served.last_at)).where(Served.model == model))
    return last_at is not None and last_at > float(row.suspect_group.partition("-")[0])


class _Plan:
    """Who goes back to the queue, and in which company."""

    def __init__(self) -> None:
        self.groups: dict[str, list[AnyRow]] = {}
        self.innocent: list[AnyRow] = []
        self.orphans: list[AnyRow] = []
        self.deaths: list[_LoneCrash] = []

    def suspect(self, owned: Sequence[AnyRow], now: float) -> Sequence[AnyRow]:
        """Sort the requests of one lost worker, and return those that may be why it is lost."""
        suspects = [row for row in owned if not row.proven] or list(owned)
        accused = {_key(row) for row in suspects}
        self.innocent += [row for row in owned if _key(row) not in accused]
        trial = f"{now:.3f}-{secrets.token_hex(4)}"  # in the order of the trials to come
        middle = (len(suspects) + 1) // 2
        for half, members in (("a", suspects[:middle]), ("b", suspects[middle:])):
            if members:
                self.groups[f"{trial}-{half}"] = members
        return suspects

    @property
    def requeued(self) -> list[AnyRow]:
        """All that will run again."""
        return [*self.innocent, *self.orphans, *(row for rows in self.groups.values() for row in rows)]


def _is_gone(now: float, dead: Collection[str], *, lapsed: bool, patience_s: float) -> ColumnElement[bool]:
    """Return the condition that nobody is decoding a running request any more."""
    dead_or_late: list[ColumnElement[bool]] = [Request.lease_owner.in_(dead)] if dead else []
    if lapsed:
        waits = {claims: now - (2.0 ** (claims - 1) - 1) * patience_s for claims in range(2, _LONGEST_WAIT)}
        longest = now - (2.0 ** (_LONGEST_WAIT - 1) - 1) * patience_s
        since = case(
            (Request.attempts < 2, now), *((Request.attempts == n, at) for n, at in waits.items()), else_=longest
        )
        dead_or_late.append(Request.lease_expires_at < since)
    return and_(Request.status == "running", or_(false(), *dead_or_late))


def _lock(session: Session, job_ids: Collection[str], gone: ColumnElement[bool]) -> Sequence[AnyRow]:
    """Lock the requests to be given back. Their jobs are locked, but a renewal may have come just before that."""
    return session.execute(
        select(
            Request.job_id,
            Request.request_index,
            Request.custom_id,
            Request.lease_owner,
            Request.lease_expires_at,
            Request.proven,
            Request.suspect_group,
            Request.lone_crashes,
            Request.lone_served,
            Request.lone_host,
        )
        .where(Request.job_id.in_(job_ids), gone)
        .order_by(Request.job_id, Request.request_index)
        .with_for_update(key_share=True)
    ).all()


def _owners_that_renew(session: Session, now: float) -> set[str]:
    rows = session.scalars(
        select(Request.lease_owner)
        .join(Job, Job.id == Request.job_id)
        .where(Job.status.in_(ACTIVE_JOB_STATUSES), Request.status == "running", Request.lease_expires_at >= now)
        .distinct()
    )
    return {owner for owner in rows if owner is not None}


def _by_owner(rows: Iterable[AnyRow]) -> Mapping[str, list[AnyRow]]:
    found: defaultdict[str, list[AnyRow]] = defaultdict(list)
    for row in rows:
        found[row.lease_owner].append(row)
    return found


def _carry_out(session: Session, plan: _Plan, now: float) -> Reclaimed:
    _requeue(session, plan.innocent)
    _requeue(session, plan.orphans, attempts=Request.attempts - 1)
    for group, members in plan.groups.items():
        _requeue(session, members, suspect_group=group)
    failed: list[FailedRequest] = []
    for death in plan.deaths:
        if death.verdict is not None:
            failed += fail_requests(session, [_key(death.row)], death.verdict, now)
        known = {"lone_crashes": death.crashes, "lone_served": death.served, "lone_host": death.host}
        session.execute(update(Request).where(is_request([_key(death.row)])).values(**known))
    ended = {(request.job_id, request.request_index) for request in failed}
    jobs = {row.job_id for row in plan.requeued if _key(row) not in ended}
    models = session.execute(select(Job.id, Job.model).where(Job.id.in_(jobs)).order_by(Job.id)) if jobs else ()
    return Reclaimed(
        requeued=tuple((job_id, model) for job_id, model in models),
        poisoned=tuple(failed),
        ended_jobs=tuple(end_finished_jobs(session, {job_id for job_id, _ in ended})),
    )


def _requeue(session: Session, rows: Sequence[AnyRow], **columns: Any) -> None:
    if not rows:
        return
    given_back = {"status": "queued", "lease_owner": None, "lease_expires_at": None, "suspect_group": None}
    session.execute(update(Request).where(is_request(map(_key, rows))).values(**{**given_back, **columns}))


def _key(row: AnyRow) -> RequestKey:
    return (row.job_id, row.request_index)
