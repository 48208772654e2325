"""Reclaiming: requests whose worker is gone go back to the queue, and one that kills its workers is found and failed.

jobs.reconciler -> [reclaim] -> models.  Nobody can tell from outside which of the requests in flight killed a worker,
or whether any did. So they are suspects and run again in halves, one half at a time (storage.leases sees to that): the
half with the guilty one kills its worker again and is halved again, the others come through. A request that was alone
in trial and killed its worker twice without committing a token in between gets an error row.

What has committed tokens since it was claimed is proven: it is no suspect as long as others are not.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, false, or_, select, update
from sqlalchemy.orm import Session

from storage.endings import OPEN_JOB_STATUSES, fail_requests, finalise_jobs, lock_jobs
from storage.models import Job, Request, Worker
from storage.records import FailedRequest, Refusal, RequestKey
from storage.sql import AnyRow, database_now, is_request

POISON: Final = Refusal(
    "poison", "The worker process died twice while this request was the only one on trial.", status_code=500
)

LONE_CRASHES: Final = 2  # so often may work that was alone in trial cost its worker
_ORPHANED_S: Final = 5.0  # a lease that lapsed so long ago, of an owner that renews its others, is one it never knew of


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What a round of reclaiming did."""

    requeued: tuple[tuple[str, str], ...] = ()  # (job_id, model) of jobs that have requests to claim again
    poisoned: tuple[FailedRequest, ...] = ()
    ended_jobs: tuple[tuple[str, str], ...] = ()  # (job_id, final status)


def reclaim(session: Session, dead: Collection[str] = (), *, lapsed: bool = True) -> Reclaimed:
    """Give back the requests of the dead workers and, with `lapsed`, of all that did not renew their leases in time.

    Whoever could not reach the database for a while leaves `lapsed` out for the length of a lease: the owners could not
    renew either, and shall be the first to do so.
    """
    now = database_now(session)
    gone = _is_gone(now, dead, lapsed=lapsed)
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
        else:
            plan.accuse(owned, now)
    return _carry_out(session, plan, now)


def running_processes(session: Session) -> dict[str, str | None]:
    """Return the workers that have neither left nor been found lost, with the processes they say they are."""
    running = session.execute(
        select(Worker.id, Worker.process).where(Worker.stopped_at.is_(None), Worker.lost_at.is_(None))
    )
    return dict(running.all())


def mark_lost(session: Session, dead: Collection[str], silent_s: float) -> None:
    """Note which workers are dead, or have said nothing for so long."""
    now = database_now(session)
    lost = or_(Worker.id.in_(dead), Worker.last_seen_at < now - silent_s)
    unmarked = (Worker.stopped_at.is_(None), Worker.lost_at.is_(None))
    session.execute(update(Worker).where(*unmarked, lost).values(lost_at=now))


class _Plan:
    """Who goes back to the queue, and in which company."""

    def __init__(self) -> None:
        self.groups: dict[str, list[AnyRow]] = {}
        self.innocent: list[AnyRow] = []
        self.orphans: list[AnyRow] = []
        self.alone: list[AnyRow] = []
        self.poison: list[AnyRow] = []

    def accuse(self, owned: Sequence[AnyRow], now: float) -> None:
        """Sort the requests of one lost worker."""
        suspects = [row for row in owned if not row.proven] or list(owned)
        accused = {_key(row) for row in suspects}
        self.innocent += [row for row in owned if _key(row) not in accused]
        if len(suspects) == 1 and not suspects[0].proven:
            (row,) = suspects
            if row.lone_crashes + 1 >= LONE_CRASHES:
                self.poison.append(row)
                return
            self.alone.append(row)
        trial = f"{now:.3f}-{secrets.token_hex(4)}"  # in the order of the trials to come
        middle = (len(suspects) + 1) // 2
        for half, members in (("a", suspects[:middle]), ("b", suspects[middle:])):
            if members:
                self.groups[f"{trial}-{half}"] = members

    @property
    def requeued(self) -> list[AnyRow]:
        """All that will run again."""
        return [*self.innocent, *self.orphans, *(row for rows in self.groups.values() for row in rows)]


def _is_gone(now: float, dead: Collection[str], *, lapsed: bool) -> ColumnElement[bool]:
    """Return the condition that nobody is decoding a running request any more."""
    dead_or_late: list[ColumnElement[bool]] = [Request.lease_owner.in_(dead)] if dead else []
    dead_or_late += [Request.lease_expires_at < now] if lapsed else []
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
            Request.lone_crashes,
        )
        .where(Request.job_id.in_(job_ids), gone)
        .order_by(Request.job_id, Request.request_index)
        .with_for_update(key_share=True)
    ).all()


def _owners_that_renew(session: Session, now: float) -> set[str]:
    rows = session.scalars(
        select(Request.lease_owner)
        .join(Job, Job.id == Request.job_id)
        .where(Job.status.in_(OPEN_JOB_STATUSES), Request.status == "running", Request.lease_expires_at >= now)
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
    if plan.alone:
        session.execute(
            update(Request).where(is_request(map(_key, plan.alone))).values(lone_crashes=Request.lone_crashes + 1)
        )
    failed = fail_requests(session, [_key(row) for row in plan.poison], POISON, now)
    jobs = {row.job_id for row in plan.requeued}
    models = session.execute(select(Job.id, Job.model).where(Job.id.in_(jobs)).order_by(Job.id)) if jobs else ()
    return Reclaimed(
        requeued=tuple((job_id, model) for job_id, model in models),
        poisoned=tuple(failed),
        ended_jobs=tuple(finalise_jobs(session, {row.job_id for row in plan.poison})),
    )


def _requeue(session: Session, rows: Sequence[AnyRow], **columns: Any) -> None:
    if not rows:
        return
    given_back = {"status": "queued", "lease_owner": None, "lease_expires_at": None, "suspect_group": None}
    session.execute(update(Request).where(is_request(map(_key, rows))).values(**{**given_back, **columns}))


def _key(row: AnyRow) -> RequestKey:
    return (row.job_id, row.request_index)
