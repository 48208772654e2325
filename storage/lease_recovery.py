"""Lease recovery: requeue the requests of lost workers, and find and fail the request that crashes its workers.

From outside, a crash does not show which of the requests in flight caused it, or whether any did. All of them become
suspects and are bisected: they are requeued in two quarantine groups (`suspect_group`), and storage.leases runs one
group at a time. The half with the cause crashes its worker again and is bisected again; the other half is cleared.

A request that has committed tokens since it was claimed is cleared (`proven`). It is a suspect only if all the requests
of its worker are cleared.

A request fails as poison only after crashes that were observed (the process is known to be dead) while it ran alone in
quarantine and without a committed token in between. A lapsed lease is no crash: a step can take longer than a lease, so
the request is only requeued. To rule out a bad host, one of these must hold as well:

- the crashes were on two hosts;
- one of the workers had served another request before it crashed;
- no other request of the model could test the host, and the worker crashed `_MAX_UNTESTED_CRASHES` times for each
  waiting request: the more requests crash alike, the likelier the host is the cause.

Columns: `lone_crashes`, `lone_served` and `lone_host` describe the crashes of a request that ran alone.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, false, func, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, database_now, has_served, is_request, is_serving
from storage.models import JobRow, Request, Served, Worker
from storage.records import FailedRequest, RequestFailure, RequestKey
from storage.statuses import ACTIVE_JOB_STATUSES, OPEN_REQUEST_STATUSES
from storage.transitions import end_finished_jobs, fail_requests, lock_jobs

POISON: Final = RequestFailure(
    "poison", "The worker process crashed twice while it ran this request alone.", status_code=500
)

MAX_LONE_CRASHES: Final = 2  # observed crashes of work that ran alone in quarantine
_MAX_UNTESTED_CRASHES: Final = 4  # the same on a host that has served nothing, per waiting request
_MAX_BACKOFF_CLAIMS: Final = 5  # number of claims from which the wait for a late owner no longer doubles
# An owner that renews its other leases never learnt of one that lapsed longer ago: the claim's answer was lost.
_ORPHANED_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What one call of `reclaim` did."""

    requeued: tuple[tuple[str, str], ...] = ()  # (job_id, model) of jobs with requeued requests
    poisoned: tuple[FailedRequest, ...] = ()
    ended_jobs: tuple[tuple[str, str], ...] = ()  # (job_id, final status)


def reclaim(session: Session, dead: Collection[str] = (), *, lapsed: bool = True, patience_s: float = 0.0) -> Reclaimed:
    """Requeue the requests of `dead` workers and, with `lapsed`, those whose leases were not renewed in time.

    `dead` are workers whose process is known to have ended; only such crashes count against a request. After an outage
    of the database, pass `lapsed=False` for the length of a lease: the owners could not renew either. A request that
    was claimed before waits longer for a late owner, by 1, 3, 7 and then 15 times `patience_s`, so that a step longer
    than a lease can finish.
    """
    now = database_now(session)
    lost_worker = _has_lost_worker(now, dead, lapsed=lapsed, patience_s=patience_s)
    has_lost = select(Request.job_id).where(Request.job_id == JobRow.id, lost_worker).correlate(JobRow).exists()
    job_ids = lock_jobs(session, and_(JobRow.status == "in_progress", has_lost))
    if not job_ids:
        return Reclaimed()
    rows = _lock(session, job_ids, lost_worker)
    renewing = _owners_that_renew(session, now) - set(dead)
    plan = _RecoveryPlan()
    for owner, owned in _by_owner(rows).items():
        if owner in renewing:
            plan.orphans += [row for row in owned if row.lease_expires_at < now - _ORPHANED_S]
            continue
        suspects = plan.bisect(owned, now)
        if owner in dead and len(suspects) == 1 and not suspects[0].proven:
            plan.lone_crashes.append(_lone_crash(session, suspects[0]))
    return _apply(session, plan, now)


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker and the identity of its process, to check whether it still runs."""

    worker_id: str
    process: str | None
    hostname: str
    started_at: float
    last_seen_at: float


def running_processes(session: Session) -> list[WorkerProcess]:
    """Return workers that have not stopped and are not marked lost, and lost ones that still own work."""
    owners = (
        select(Request.lease_owner)
        .join(JobRow, JobRow.id == Request.job_id)
        .where(JobRow.status.in_(ACTIVE_JOB_STATUSES), Request.status == "running")
    )
    checking = select(JobRow.comparing_by).where(JobRow.compare_plain > 0, JobRow.compared_at.is_(None))
    owns_work = or_(Worker.id.in_(owners), Worker.id.in_(checking.where(JobRow.comparing_by.is_not(None))))
    columns = (Worker.id, Worker.process, Worker.hostname, Worker.started_at, Worker.last_seen_at)
    rows = session.execute(
        select(*columns).where(Worker.stopped_at.is_(None), or_(Worker.lost_at.is_(None), owns_work))
    )
    return [WorkerProcess(*row) for row in rows]


def mark_lost(session: Session, dead: Collection[str], silent_s: float | None = None) -> None:
    """Mark the `dead` workers as lost; with `silent_s`, also those whose last heartbeat is older."""
    now = database_now(session)
    lost: ColumnElement[bool] = Worker.id.in_(dead)
    if silent_s is not None:
        lost |= Worker.last_seen_at < now - silent_s
    unmarked = (Worker.stopped_at.is_(None), Worker.lost_at.is_(None))
    session.execute(update(Worker).where(*unmarked, lost).values(lost_at=now))


@dataclass(frozen=True, slots=True)
class _LoneCrash:
    """The crash of a worker that ran one request alone, with the history of such crashes of that request."""

    row: AnyRow
    crashes: (
        int  # in a row; a crash while other workers serve the model may be the host's fault, and restarts the count
    )
    served: bool  # one of the crashed workers had served another request
    host: str | None  # hostname of the first crash, where known
    hosts: int  # distinct known hosts, at most 2
    waiting: int  # open requests of the model

    @property
    def failure(self) -> RequestFailure | None:
        """Return why the request fails; None: it runs again."""
        if self.hosts > 1:
            return _poison(MAX_LONE_CRASHES, "The crashes were on two hosts.")
        if self.crashes >= MAX_LONE_CRASHES and self.served:
            return _poison(self.crashes, "The host had served other requests.")
        if self.crashes >= _MAX_UNTESTED_CRASHES * self.waiting:
            return _poison(self.crashes, "No other request was served meanwhile, so the host may be at fault.")
        return None


def _poison(crashes: int, why: str) -> RequestFailure:
    message = POISON.message if crashes <= MAX_LONE_CRASHES else POISON.message.replace("twice", f"{crashes} times")
    return replace(POISON, message=f"{message} {why}")


def _lone_crash(session: Session, row: AnyRow) -> _LoneCrash:
    host = session.scalar(select(Worker.hostname).where(Worker.id == row.lease_owner))
    model = session.scalars(select(JobRow.model).where(JobRow.id == row.job_id)).one()
    waiting = session.scalar(
        select(func.count())
        .select_from(Request)
        .join(JobRow, JobRow.id == Request.job_id)
        .where(is_serving(), JobRow.model == model, Request.status.in_(OPEN_REQUEST_STATUSES))
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
    """Return whether any worker has served a request of the model since this one was last requeued."""
    if row.suspect_group is None:
        return False
    last_at = session.scalar(select(func.max(Served.last_at)).where(Served.model == model))
    return last_at is not None and last_at > float(row.suspect_group.partition("-")[0])


class _RecoveryPlan:
    """Which requests to requeue, in which quarantine groups, and which crashes to count."""

    def __init__(self) -> None:
        self.groups: dict[str, list[AnyRow]] = {}
        self.cleared: list[AnyRow] = []
        self.orphans: list[AnyRow] = []
        self.lone_crashes: list[_LoneCrash] = []

    def bisect(self, owned: Sequence[AnyRow], now: float) -> Sequence[AnyRow]:
        """Split the suspects of one lost worker into two quarantine groups, and return them."""
        suspects = [row for row in owned if not row.proven] or list(owned)
        suspected = {_key(row) for row in suspects}
        self.cleared += [row for row in owned if _key(row) not in suspected]
        prefix = f"{now:.3f}-{secrets.token_hex(4)}"  # groups run in the order of their names
        middle = (len(suspects) + 1) // 2
        for half, members in (("a", suspects[:middle]), ("b", suspects[middle:])):
            if members:
                self.groups[f"{prefix}-{half}"] = members
        return suspects

    @property
    def requeued(self) -> list[AnyRow]:
        """Every request that will run again."""
        return [*self.cleared, *self.orphans, *(row for rows in self.groups.values() for row in rows)]


def _has_lost_worker(now: float, dead: Collection[str], *, lapsed: bool, patience_s: float) -> ColumnElement[bool]:
    """Return the condition that a running request has lost its worker."""
    lost: list[ColumnElement[bool]] = [Request.lease_owner.in_(dead)] if dead else []
    if lapsed:
        deadlines = {claims: now - (2.0 ** (claims - 1) - 1) * patience_s for claims in range(2, _MAX_BACKOFF_CLAIMS)}
        last_deadline = now - (2.0 ** (_MAX_BACKOFF_CLAIMS - 1) - 1) * patience_s
        lapsed_before = case(
            (Request.attempts < 2, now),
            *((Request.attempts == n, at) for n, at in deadlines.items()),
            else_=last_deadline,
        )
        lost.append(Request.lease_expires_at < lapsed_before)
    return and_(Request.status == "running", or_(false(), *lost))


def _lock(session: Session, job_ids: Collection[str], lost_worker: ColumnElement[bool]) -> Sequence[AnyRow]:
    """Lock the requests to requeue. The condition is checked again: a renewal may have preceded the lock of the job."""
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
        .where(Request.job_id.in_(job_ids), lost_worker)
        .order_by(Request.job_id, Request.request_index)
        .with_for_update(key_share=True)
    ).all()


def _owners_that_renew(session: Session, now: float) -> set[str]:
    rows = session.scalars(
        select(Request.lease_owner)
        .join(JobRow, JobRow.id == Request.job_id)
        .where(JobRow.status.in_(ACTIVE_JOB_STATUSES), Request.status == "running", Request.lease_expires_at >= now)
        .distinct()
    )
    return {owner for owner in rows if owner is not None}


def _by_owner(rows: Iterable[AnyRow]) -> Mapping[str, list[AnyRow]]:
    found: defaultdict[str, list[AnyRow]] = defaultdict(list)
    for row in rows:
        found[row.lease_owner].append(row)
    return found


def _apply(session: Session, plan: _RecoveryPlan, now: float) -> Reclaimed:
    _requeue(session, plan.cleared)
    _requeue(session, plan.orphans, attempts=Request.attempts - 1)
    for group, members in plan.groups.items():
        _requeue(session, members, suspect_group=group)
    failed: list[FailedRequest] = []
    for crash in plan.lone_crashes:
        if crash.failure is not None:
            failed += fail_requests(session, [_key(crash.row)], crash.failure, now)
        known = {"lone_crashes": crash.crashes, "lone_served": crash.served, "lone_host": crash.host}
        session.execute(update(Request).where(is_request([_key(crash.row)])).values(**known))
    ended = {(request.job_id, request.request_index) for request in failed}
    jobs = {row.job_id for row in plan.requeued if _key(row) not in ended}
    models = (
        session.execute(select(JobRow.id, JobRow.model).where(JobRow.id.in_(jobs)).order_by(JobRow.id)) if jobs else ()
    )
    return Reclaimed(
        requeued=tuple((job_id, model) for job_id, model in models),
        poisoned=tuple(failed),
        ended_jobs=tuple(end_finished_jobs(session, {job_id for job_id, _ in ended})),
    )


def _requeue(session: Session, rows: Sequence[AnyRow], **columns: Any) -> None:
    if not rows:
        return
    requeued = {"status": "queued", "lease_owner": None, "lease_expires_at": None, "suspect_group": None}
    session.execute(update(Request).where(is_request(map(_key, rows))).values(**{**requeued, **columns}))


def _key(row: AnyRow) -> RequestKey:
    return (row.job_id, row.request_index)
