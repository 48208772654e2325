"""Webhooks: endpoints, and the outbox of deliveries. A delivery is one event for one endpoint.

The transaction that ends a job writes its deliveries, so no event is lost and none is sent for an end that was rolled
back. Senders claim what is due: a claim moves `next_at` beyond the time that an attempt may take, and `attempts` is its
fencing token. A sender that dies is replaced when its claim ends, so an event may arrive twice, with the same id.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, bindparam, delete, exists, func, insert, or_, select, tuple_, update
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, clock, database_now, dialect_of, insert_many, owned_by
from storage.models import ChoiceOutput, JobRow, Request, WebhookDelivery, WebhookEndpoint
from storage.statuses import DELIVERY_STATUSES

EVENT_TYPES: Final = (
    *(f"batch.{status}" for status in ("completed", "failed", "expired", "cancelled")),
    *(f"response.{status}" for status in ("completed", "incomplete", "failed", "cancelled")),
)


@dataclass(frozen=True, slots=True)
class NewEndpoint:
    """An endpoint to insert."""

    id: str
    api_key_id: str  # '' without a key
    name: str
    url: str
    event_types: tuple[str, ...]
    secret: str
    job_id: str | None = None  # None: all jobs
    all_keys: bool = False


@dataclass(frozen=True, slots=True)
class EndpointView:
    """An endpoint, with its secret: what shows it to callers leaves the secret out."""

    id: str
    api_key_id: str
    name: str
    url: str
    event_types: tuple[str, ...]
    job_id: str | None
    all_keys: bool
    secret: str
    old_secret: str | None  # signs too, until `old_secret_until`
    old_secret_until: float | None
    created_at: float
    updated_at: float

    def secrets_at(self, now: float) -> tuple[str, ...]:
        """Return the secrets that sign at a time (Unix seconds), the newest first."""
        is_kept = self.old_secret is not None and (self.old_secret_until or 0) > now
        return (self.secret, self.old_secret or "") if is_kept else (self.secret,)


@dataclass(frozen=True, slots=True)
class DeliveryView:
    """A delivery: what was sent to which endpoint, and how that went."""

    id: str
    endpoint_id: str
    event_type: str
    job_id: str
    created_at: float
    status: str  # pending, delivered or dead
    attempts: int
    queued_at: float
    next_at: float
    last_status_code: int | None
    last_error: str | None
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class DeliveryPage:
    """A page of the list of deliveries; `has_more`: deliveries follow it."""

    deliveries: tuple[DeliveryView, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class DeadDeliveries:
    """How many deliveries to an endpoint are dead."""

    endpoint_id: str
    url: str
    count: int


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    """A delivery that one sender may send now."""

    delivery: DeliveryView
    endpoint: EndpointView
    now: float  # the database's clock at the claim


@dataclass(frozen=True, slots=True)
class Attempt:
    """How an attempt ended. `delivered`: the endpoint took the event; `final`: another attempt would be useless."""

    status_code: int | None
    error: str | None
    delivered: bool
    final: bool = False


def add_endpoint(session: Session, new: NewEndpoint) -> None:
    """Insert an endpoint."""
    now = database_now(session)
    columns = {**asdict(new), "event_types": list(new.event_types), "created_at": now, "updated_at": now}
    session.execute(insert(WebhookEndpoint).values(**columns))


def lock_status(session: Session, job_id: str) -> str | None:
    """Return the status of a job, which can't end until the transaction does; None if there is no such job."""
    return session.scalar(select(JobRow.status).where(JobRow.id == job_id).with_for_update(key_share=True))


def count_endpoints(session: Session, owner: str) -> int:
    """Return how many endpoints a key has."""
    return int(session.scalar(select(func.count()).where(WebhookEndpoint.api_key_id == owner)) or 0)


def endpoint(session: Session, endpoint_id: str, owner: str | None = None) -> EndpointView | None:
    """Return an endpoint; None if it does not exist or belongs to another owner."""
    return next(iter(_endpoints(session, WebhookEndpoint.id == endpoint_id, owner)), None)


def endpoints(
    session: Session, limit: int, after: str | None = None, owner: str | None = None
) -> tuple[list[EndpointView], bool]:
    """Return up to `limit` endpoints, newest first, after the endpoint `after`; and whether more follow."""
    which = _follows(WebhookEndpoint.created_at, WebhookEndpoint.id, after)
    found = _endpoints(session, which, owner, limit + 1)
    return found[:limit], len(found) > limit


def change_endpoint(session: Session, endpoint_id: str, **columns: Any) -> None:
    """Change columns of an endpoint: name, url, event_types, secret, old_secret, old_secret_until."""
    values = {**columns, "updated_at": database_now(session)}
    session.execute(update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id).values(**values))


def remove_endpoint(session: Session, endpoint_id: str, owner: str | None = None) -> bool:
    """Remove an endpoint and its deliveries, also those that wait; return whether it existed."""
    mine = (WebhookEndpoint.id == endpoint_id, owned_by(WebhookEndpoint.api_key_id, owner))
    if session.execute(delete(WebhookEndpoint).where(*mine).returning(WebhookEndpoint.id)).first() is None:
        return False
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id))
    return True


def remove_endpoints_of(session: Session, key_id: str) -> None:
    """Remove the endpoints of a key that is revoked."""
    for endpoint_id in session.scalars(select(WebhookEndpoint.id).where(WebhookEndpoint.api_key_id == key_id)).all():
        remove_endpoint(session, endpoint_id)


def queue_deliveries(session: Session, job_ids: Collection[str]) -> None:
    """Queue the events of jobs that this transaction has ended, for each endpoint that wants them."""
    if not job_ids:
        return
    rows = session.execute(_listeners(), {"job_ids": list(job_ids)}).all()
    events = [(row.endpoint_id, row.job_id, kind) for row in rows for kind in _event_types(session, row)]
    if not events:
        return
    now = database_now(session)
    times = {"created_at": now, "queued_at": now, "next_at": now}
    deliveries = [
        {"id": f"evt_{secrets.token_hex(16)}", "endpoint_id": endpoint_id, "event_type": kind, "job_id": job_id}
        | {"status": "pending", "attempts": 0, **times}
        for endpoint_id, job_id, kind in events
    ]
    insert_many(session, WebhookDelivery, deliveries)


def is_due(session: Session) -> bool:
    """Return whether a delivery is due."""
    due = and_(WebhookDelivery.status == "pending", WebhookDelivery.next_at <= clock(dialect_of(session)))
    return bool(session.scalar(select(exists().where(due))))


def claim_deliveries(
    session: Session, limit: int, lease_s: float, *, per_endpoint: int = 2, busy: Collection[str] = ()
) -> list[ClaimedDelivery]:
    """Claim up to `limit` due deliveries for `lease_s`, and few per endpoint: a slow one must not hold up the others.

    Endpoints in `busy` get none.
    """
    now = database_now(session)
    due = and_(WebhookDelivery.status == "pending", WebhookDelivery.next_at <= now)
    turn = func.row_number().over(
        partition_by=WebhookDelivery.endpoint_id, order_by=(WebhookDelivery.next_at, WebhookDelivery.id)
    )
    ranked = select(WebhookDelivery.id, WebhookDelivery.next_at, turn.label("turn"))
    waiting = ranked.where(due, WebhookDelivery.endpoint_id.not_in(busy)).subquery()
    first = select(waiting.c.id).where(waiting.c.turn <= per_endpoint).order_by(waiting.c.turn, waiting.c.next_at)
    ids = session.scalars(first.limit(limit)).all()
    claimed = update(WebhookDelivery).where(WebhookDelivery.id.in_(ids), due)
    claimed = claimed.values(next_at=now + lease_s, attempts=WebhookDelivery.attempts + 1)
    taken = [_delivery_view(row) for row in session.execute(claimed.returning(*_DELIVERY))] if ids else []
    known = {found.id: found for found in _endpoints(session, WebhookEndpoint.id.in_({d.endpoint_id for d in taken}))}
    orphans = [delivery.id for delivery in taken if delivery.endpoint_id not in known]
    if orphans:  # queued while their endpoint was removed
        session.execute(delete(WebhookDelivery).where(WebhookDelivery.id.in_(orphans)))
    return [ClaimedDelivery(d, known[d.endpoint_id], now) for d in taken if d.endpoint_id in known]


def record_attempt(
    session: Session, claimed: DeliveryView, attempt: Attempt, retry_in_s: float, give_up_after_s: float
) -> str | None:
    """Write the result of an attempt and return the new status; None if another sender has claimed the delivery.

    A failed one is due again in `retry_in_s`; it is dead if that is more than `give_up_after_s` after it was queued.
    """
    now = database_now(session)
    retried = not attempt.final and now + retry_in_s - claimed.queued_at <= give_up_after_s
    status = "delivered" if attempt.delivered else "pending" if retried else "dead"
    mine = (WebhookDelivery.attempts == claimed.attempts, WebhookDelivery.status == "pending")
    written = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == claimed.id, *mine)
        .values(
            status=status,
            next_at=now + retry_in_s,
            last_status_code=attempt.status_code,
            last_error=attempt.error,
            ended_at=None if status == "pending" else now,
        )
    )
    return status if session.execute(written.returning(WebhookDelivery.id)).first() is not None else None


def deliveries(
    session: Session,
    limit: int,
    after: str | None = None,
    owner: str | None = None,
    *,
    endpoint_id: str | None = None,
    status: str | None = None,
) -> DeliveryPage:
    """Return up to `limit` deliveries, newest first, after the delivery `after`."""
    query = select(*_DELIVERY).where(_is_owned(owner), _follows(WebhookDelivery.created_at, WebhookDelivery.id, after))
    if endpoint_id is not None:
        query = query.where(WebhookDelivery.endpoint_id == endpoint_id)
    if status is not None:
        query = query.where(WebhookDelivery.status == status)
    ordered = query.order_by(WebhookDelivery.created_at.desc(), WebhookDelivery.id.desc())
    rows = session.execute(ordered.limit(limit + 1)).all()
    return DeliveryPage(tuple(_delivery_view(row) for row in rows[:limit]), has_more=len(rows) > limit)


def delivery(session: Session, delivery_id: str, owner: str | None = None) -> DeliveryView | None:
    """Return a delivery; None if it does not exist or belongs to another owner."""
    row = session.execute(select(*_DELIVERY).where(WebhookDelivery.id == delivery_id, _is_owned(owner))).first()
    return None if row is None else _delivery_view(row)


def redeliver(session: Session, delivery_id: str) -> None:
    """Queue a delivery again, with all its attempts before it. One that is being sent stays as it is."""
    now = database_now(session)
    again = {"status": "pending", "queued_at": now, "next_at": now, "ended_at": None}
    ended = (WebhookDelivery.id == delivery_id, WebhookDelivery.status != "pending")
    session.execute(update(WebhookDelivery).where(*ended).values(**again))


def deliveries_by_status(session: Session) -> dict[str, int]:
    """Return the number of stored deliveries of each status, 0 included."""
    rows = session.execute(select(WebhookDelivery.status, func.count()).group_by(WebhookDelivery.status))
    return dict.fromkeys(DELIVERY_STATUSES, 0) | {row[0]: row[1] for row in rows}


def dead_deliveries(session: Session) -> list[DeadDeliveries]:
    """Return the endpoints with dead deliveries, the one with most first."""
    dead = func.count()
    query = select(WebhookEndpoint.id, WebhookEndpoint.url, dead).where(WebhookDelivery.status == "dead")
    joined = query.join(WebhookDelivery, WebhookDelivery.endpoint_id == WebhookEndpoint.id)
    grouped = joined.group_by(WebhookEndpoint.id, WebhookEndpoint.url).order_by(dead.desc(), WebhookEndpoint.id)
    return [DeadDeliveries(*row) for row in session.execute(grouped)]


def prune_deliveries(session: Session, older_than_s: float, limit: int) -> int:
    """Delete up to `limit` delivered and dead deliveries that ended longer ago; return how many."""
    old = select(WebhookDelivery.id).where(
        WebhookDelivery.status != "pending", WebhookDelivery.ended_at < database_now(session) - older_than_s
    )
    gone = delete(WebhookDelivery).where(WebhookDelivery.id.in_(old.limit(limit)))
    return len(session.scalars(gone.returning(WebhookDelivery.id)).all())


@cache  # runs whenever a job ends
def _listeners() -> Select[Any]:
    """Return the query of the endpoints that may want the end of some jobs. Most installations have none."""
    wanted = or_(WebhookEndpoint.all_keys, WebhookEndpoint.api_key_id == JobRow.api_key_id)
    of_job = or_(WebhookEndpoint.job_id.is_(None), WebhookEndpoint.job_id == JobRow.id)
    return (
        select(
            WebhookEndpoint.id.label("endpoint_id"),
            WebhookEndpoint.event_types,
            JobRow.id.label("job_id"),
            JobRow.status,
        )
        .join(JobRow, and_(wanted, of_job))
        .where(JobRow.id.in_(bindparam("job_ids", expanding=True)), JobRow.verification_of.is_(None))
        .order_by(JobRow.id, WebhookEndpoint.id)
    )


def _event_types(session: Session, row: AnyRow) -> list[str]:
    """Return the event of a job's end, if the endpoint wants it. A call whose caller waits for the answer has none."""
    if row.job_id.startswith(_WAITING_CALLS):
        return []
    is_response = row.job_id.startswith("resp_")
    kind = _response_event(session, row.job_id) if is_response else f"batch.{row.status}"
    return [kind] if kind is not None and kind in row.event_types else []


def _response_event(session: Session, job_id: str) -> str | None:
    """Return the event of a background response; None of another one, whose caller waits."""
    found = select(Request.status, Request.body).where(Request.job_id == job_id, Request.request_index == 0)
    status, body = session.execute(found).one()
    if not ((body or {}).get("response") or {}).get("background"):
        return None
    if status == "completed":
        reason = select(ChoiceOutput.finish_reason).where(ChoiceOutput.job_id == job_id)
        return f"response.{'incomplete' if session.scalar(reason.limit(1)) == 'length' else 'completed'}"
    return f"response.{'cancelled' if status == 'cancelled' else 'failed'}"


_WAITING_CALLS: Final = ("chatcmpl-", "cmpl-")


_DELIVERY: Final = tuple(getattr(WebhookDelivery, name) for name in DeliveryView.__dataclass_fields__)
_ENDPOINT: Final = tuple(getattr(WebhookEndpoint, name) for name in EndpointView.__dataclass_fields__)


def _endpoints(
    session: Session, which: ColumnElement[bool], owner: str | None = None, limit: int | None = None
) -> list[EndpointView]:
    query = select(*_ENDPOINT).where(which, owned_by(WebhookEndpoint.api_key_id, owner))
    rows = session.execute(query.order_by(WebhookEndpoint.created_at.desc(), WebhookEndpoint.id.desc()).limit(limit))
    return [EndpointView(**dict(row._mapping) | {"event_types": tuple(row.event_types)}) for row in rows]


def _delivery_view(row: AnyRow) -> DeliveryView:
    return DeliveryView(**row._mapping)


def _is_owned(owner: str | None) -> ColumnElement[bool]:
    mine = select(WebhookEndpoint.id).where(owned_by(WebhookEndpoint.api_key_id, owner))
    return WebhookDelivery.endpoint_id.in_(mine)


def _follows(created_at: Any, row_id: Any, after: str | None) -> ColumnElement[bool]:
    """Return the condition that a row follows the row `after` in a list, newest first."""
    if after is None:
        return row_id.is_not(None)  # type: ignore[no-any-return]
    last = select(created_at, row_id).where(row_id == after).scalar_subquery()
    return tuple_(created_at, row_id) < last
