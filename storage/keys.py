"""Keys to the shim: written, found, revoked, and what their limits leave room for.

jobs.keys, jobs.api, writes -> [keys] -> models.  Knows hashes only, and keeps nothing in memory: a key that is revoked
here opens nothing from the next call on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Final

from sqlalchemy import exists, func, insert, or_, select, update
from sqlalchemy.orm import Session

from storage.models import ApiKey, Job
from storage.records import NewKey
from storage.sql import database_now

_OPEN: Final = ("validating", "in_progress", "cancelling")


class QuotaExceeded(Exception):
    """A submission is more than the limits of its key leave room for; the transaction must not be committed."""

    def __init__(self, what: str, limit: int, asked: int) -> None:
        """Say of what (`requests` or `tokens`) there are how many at most, and how many it would be."""
        super().__init__(f"{asked} {what} queued, of at most {limit}")
        self.what = what
        self.limit = limit
        self.asked = asked


@dataclass(frozen=True, slots=True)
class KeyView:
    """A key as it stands."""

    id: str
    name: str
    secret_sha256: str
    scopes: tuple[str, ...]
    max_requests_queued: int | None
    max_tokens_queued: int | None
    max_requests_per_minute: int | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    opens: bool  # neither revoked nor expired


@dataclass(frozen=True, slots=True)
class OpenWork:
    """What somebody has in the queue, being decoded or waiting."""

    requests: int
    tokens: int  # that these may come to read and write at most


def add_key(session: Session, key: NewKey) -> None:
    """Write a key down."""
    now = database_now(session)
    columns = {**asdict(key), "scopes": list(key.scopes), "created_at": now}
    lasts_s = columns.pop("lasts_s")
    session.execute(insert(ApiKey).values(**columns, expires_at=None if lasts_s is None else now + lasts_s))


def revoke_key(session: Session, key_id: str) -> bool:
    """Make a key open nothing any more; False if it did not open anything before."""
    now = database_now(session)
    live = (ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    return session.execute(update(ApiKey).where(*live).values(revoked_at=now).returning(ApiKey.id)).first() is not None


def find_key(session: Session, key_id: str) -> KeyView | None:
    """Return a key, whether it opens anything or not."""
    return next(iter(_keys(session, key_id)), None)


def list_keys(session: Session) -> list[KeyView]:
    """Return all keys, in the order in which they were made."""
    return _keys(session)


def opening(session: Session, key_ids: Collection[str]) -> set[str]:
    """Return those of the keys that are neither revoked nor expired."""
    lasts = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > database_now(session))
    return set(session.scalars(select(ApiKey.id).where(ApiKey.id.in_(key_ids), ApiKey.revoked_at.is_(None), lasts)))


def keys_in_use(session: Session) -> bool:
    """Return whether there has ever been a key. Revoking the last one shuts the door; it does not open it to all."""
    return bool(session.scalar(select(exists().where(ApiKey.id.is_not(None)))))


def open_work(session: Session, key_id: str | None = None) -> OpenWork:
    """Return what the jobs of a key have in the queue; of everybody without one.

    Tokens of a job are taken to be spread evenly over its requests.
    """
    left = Job.requests_total - Job.requests_completed - Job.requests_failed
    tokens = Job.tokens_asked * left / func.nullif(Job.requests_total, 0)
    query = select(func.coalesce(func.sum(left), 0), func.coalesce(func.sum(tokens), 0))
    query = query.where(Job.status.in_(_OPEN))
    requests, asked = session.execute(query if key_id is None else query.where(Job.api_key_id == key_id)).one()
    return OpenWork(int(requests), int(asked))


def refuse_beyond_limits(session: Session, key_id: str) -> None:
    """Raise QuotaExceeded if a key has more in the queue than its limits allow, what was just written included."""
    limits = session.execute(
        select(ApiKey.max_requests_queued, ApiKey.max_tokens_queued)
        .where(ApiKey.id == key_id, or_(ApiKey.max_requests_queued.is_not(None), ApiKey.max_tokens_queued.is_not(None)))
        .with_for_update()  # two submissions of one key are counted one after the other
    ).first()
    if limits is None:
        return
    work = open_work(session, key_id)
    for what, limit, asked in (
        ("requests", limits.max_requests_queued, work.requests),
        ("tokens", limits.max_tokens_queued, work.tokens),
    ):
        if limit is not None and asked > limit:
            raise QuotaExceeded(what, limit, asked)


def _keys(session: Session, key_id: str | None = None) -> list[KeyView]:
    now = database_now(session)
    query = select(ApiKey.__table__).order_by(ApiKey.created_at, ApiKey.id)
    rows = session.execute(query if key_id is None else query.where(ApiKey.id == key_id))
    return [_view(dict(row._mapping), now) for row in rows]


def _view(columns: dict[str, object], now: float) -> KeyView:
    expires_at = columns["expires_at"]
    expired = isinstance(expires_at, float) and expires_at <= now
    columns["scopes"] = tuple(columns["scopes"])  # type: ignore[arg-type]
    return KeyView(**columns, opens=columns["revoked_at"] is None and not expired)  # type: ignore[arg-type]
