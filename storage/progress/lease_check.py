"""Which leases of a worker are still its own, checked under the locks of their jobs and requests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Select, bindparam, or_, select
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, database_now, has_keys, key_parameters
from storage.models import JobRow, Request
from storage.records import Lease, RequestKey


class LeaseState(Enum):
    """What a flush may do under a lease."""

    HELD = auto()
    ENDED = auto()  # this owner has ended the request already: the flush is a repeat
    CANCELLED = auto()  # held, but the job is being cancelled
    LOST = auto()


@dataclass(frozen=True, slots=True)
class LeaseCheck:
    """The leases of a flush, whose jobs and requests are locked."""

    states: Mapping[Lease, LeaseState]
    event_numbers: Mapping[str, int]  # the next one of each job
    unproven: frozenset[RequestKey]  # requests without committed tokens of any lease
    paused: frozenset[RequestKey]  # held requests of paused jobs
    budgeted: frozenset[str]  # jobs with a budget
    now: float  # Unix seconds of the database's clock

    def keys(self, wanted: LeaseState) -> set[RequestKey]:
        """Return the requests of the leases in a state."""
        return {lease.key for lease, state in self.states.items() if state is wanted}


def check_leases(session: Session, worker_id: str, leases: Collection[Lease]) -> LeaseCheck:
    """Lock jobs and requests of the leases, in order, and return their states."""
    jobs = {job.id: job for job in _locked_jobs(session, {lease.job_id for lease in leases})}
    requests = {(row.job_id, row.request_index): row for row in _locked_requests(session, {le.key for le in leases})}
    now = database_now(session)
    states = {le: _state(le, worker_id, jobs.get(le.job_id), requests.get(le.key), now) for le in leases}
    held = (lease for lease, state in states.items() if state is LeaseState.HELD)
    return LeaseCheck(
        states=states,
        event_numbers={job_id: job.event_number + 1 for job_id, job in jobs.items()},
        unproven=frozenset(key for key, row in requests.items() if not row.proven),
        paused=frozenset(lease.key for lease in held if jobs[lease.job_id].paused_at is not None),
        budgeted=frozenset(job_id for job_id, job in jobs.items() if job.budgeted),
        now=now,
    )


def _locked_jobs(session: Session, job_ids: Collection[str]) -> Collection[AnyRow]:
    return session.connection().execute(_JOBS, {"job_ids": list(job_ids)}).all()


_JOBS: Final = (
    select(
        JobRow.id,
        JobRow.status,
        JobRow.paused_at,
        JobRow.expires_at,
        JobRow.event_number,
        or_(JobRow.budget_tokens.is_not(None), JobRow.budget_s.is_not(None)).label("budgeted"),
    )
    .where(JobRow.id.in_(bindparam("job_ids", expanding=True)))
    .order_by(JobRow.id)
    .with_for_update(key_share=True)
)


def _locked_requests(session: Session, keys: Collection[RequestKey]) -> Collection[AnyRow]:
    jobs, parameters = key_parameters(keys)
    return session.connection().execute(_requests(jobs), parameters).all()


@lru_cache(maxsize=64)
def _requests(jobs: int) -> Select[*tuple[Any, ...]]:
    query = select(
        Request.job_id,
        Request.request_index,
        Request.status,
        Request.lease_owner,
        Request.lease_number,
        Request.expires_at,
        Request.proven,
    )
    ordered = query.where(has_keys(jobs)).order_by(Request.job_id, Request.request_index)
    return ordered.with_for_update(key_share=True)


def _state(lease: Lease, worker_id: str, job: AnyRow | None, request: AnyRow | None, now: float) -> LeaseState:
    if job is None or request is None or (request.lease_owner, request.lease_number) != (worker_id, lease.number):
        return LeaseState.LOST
    if request.status in ("completed", "failed"):
        return LeaseState.ENDED
    if request.status != "running" or (request.expires_at is not None and request.expires_at <= now):
        return LeaseState.LOST
    if job.status == "cancelling":
        return LeaseState.CANCELLED
    return LeaseState.HELD if job.status == "in_progress" and job.expires_at > now else LeaseState.LOST
