"""API keys: create, find and revoke them, and enforce their limits on queued work.

Stores hashes only and caches nothing: a revoked key is rejected from the next call on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection, Select, bindparam, exists, func, insert, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, clock, database_now, dialect_of
from storage.models import ApiKey, JobRow
from storage.records import NewKey
from storage.statuses import QUOTA_JOB_STATUSES
from storage.webhooks import remove_endpoints_of

_KEYS: Final = ApiKey.__table__
_IN_USE: Final = select(exists().where(_KEYS.c.id.is_not(None)))  # runs with every API call

_JOBS: Final = JobRow.__table__.c
_LEFT: Final = _JOBS.requests_total - _JOBS.requests_completed - _JOBS.requests_failed
_TOKENS: Final = _JOBS.tokens_asked * _LEFT / func.nullif(_JOBS.requests_total, 0)
# Built once: they run with every submission.
_ALL_WORK: Final = select(func.coalesce(func.sum(_LEFT), 0), func.coalesce(func.sum(_TOKENS), 0)).where(
    _JOBS.status.in_(QUOTA_JOB_STATUSES)
)
_MAY_CACHE: Final = select(_KEYS.c.cache).where(_KEYS.c.id == bindparam("key_id"))
_LIMITED: Final = or_(ApiKey.max_requests_queued.is_not(None), ApiKey.max_tokens_queued.is_not(None))
_LIMITS: Final = select(ApiKey.max_requests_queued, ApiKey.max_tokens_queued).where(
    ApiKey.id == bindparam("key_id"), _LIMITED
)
_WORK: Final = _ALL_WORK.where(_JOBS.api_key_id == bindparam("key_id"))


class QuotaExceeded(Exception):
    """A submission exceeds the limits of its API key. The transaction must not be committed."""

    def __init__(self, what: str, limit: int, asked: int) -> None:
        super().__init__(f"{asked} {what} queued, at most {limit} allowed")
        self.what = what
        self.limit = limit
        self.asked = asked


@dataclass(frozen=True, slots=True)
class KeyView:
    """An API key without its secret."""

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
    # Seconds to keep them after their job has ended, files after their creation; None: the installation's settings.
    prompts_kept_s: float | None
    outputs_kept_s: float | None
    files_kept_s: float | None
    steps_kept_s: float | None
    cache: bool  # its requests may be answered from the cache
    valid: bool  # neither revoked nor expired


@dataclass(frozen=True, slots=True)
class OpenWork:
    """Queued and running requests of a key or of all keys, and their tokens."""

    requests: int
    tokens: int  # upper bound of their prompt and completion tokens


def add_key(session: Session, key: NewKey) -> None:
    """Insert a key; its lifetime starts now."""
    now = database_now(session)
    columns = {**asdict(key), "scopes": list(key.scopes), "created_at": now}
    lasts_s = columns.pop("lasts_s")
    session.execute(insert(ApiKey).values(**columns, expires_at=None if lasts_s is None else now + lasts_s))


def change_retention(session: Session, key_id: str, kept_s: Mapping[str, float | None]) -> None:
    """Change how long a key's data is kept: columns such as `prompts_kept_s`, in seconds; None: as the settings say."""
    if kept_s:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(**kept_s))


def change_cache(session: Session, key_id: str, cache: bool) -> None:
    """Change whether later requests of a key may be answered from the cache."""
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(cache=cache))


def may_cache(session: Session | Connection, key_id: str) -> bool:
    """Return whether requests of a key may be answered from the cache; those of other owners may."""
    return session.scalar(_MAY_CACHE, {"key_id": key_id}) is not False


def revoke_key(session: Session, key_id: str) -> bool:
    """Revoke a key and remove its webhooks; False if it does not exist or was revoked before."""
    now = database_now(session)
    live = (ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    remove_endpoints_of(session, key_id)
    return session.execute(update(ApiKey).where(*live).values(revoked_at=now).returning(ApiKey.id)).first() is not None


def find_key(session: Session | Connection, key_id: str) -> KeyView | None:
    """Return a key, valid or not; None if it does not exist."""
    return next(iter(_keys(session, key_id)), None)


def list_keys(session: Session) -> list[KeyView]:
    """Return all keys in order of creation."""
    return _keys(session)


def valid_keys(session: Session, key_ids: Collection[str]) -> set[str]:
    """Return the ids of those keys that are neither revoked nor expired."""
    unexpired = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > database_now(session))
    return set(session.scalars(select(ApiKey.id).where(ApiKey.id.in_(key_ids), ApiKey.revoked_at.is_(None), unexpired)))


def keys_in_use(session: Session | Connection) -> bool:
    """Return whether any key exists, revoked ones included: revoking the last key must not disable authentication."""
    return bool(session.scalar(_IN_USE))


def open_work(session: Session, key_id: str | None = None) -> OpenWork:
    """Return the open work of a key; None: of all keys.

    Assumes that the tokens of a job are spread evenly over its requests.
    """
    requests, asked = session.execute(_ALL_WORK if key_id is None else _WORK, {"key_id": key_id}).one()
    return OpenWork(int(requests), int(asked))


def enforce_limits(session: Session, key_id: str) -> None:
    """Raise QuotaExceeded if the open work of a key, the job just written included, exceeds its limits."""
    limits = session.execute(_LIMITS.with_for_update(), {"key_id": key_id}).first() if key_id else None
    if limits is not None:  # the lock serialises the submissions of one key
        _enforce(limits, open_work(session, key_id))


def enforce_limits_with(session: Session, key_id: str, more: OpenWork) -> None:
    """Raise QuotaExceeded if the open work of a key and `more` exceed its limits."""
    limits = session.execute(_LIMITS, {"key_id": key_id}).first() if key_id else None
    if limits is not None:
        work = open_work(session, key_id)
        _enforce(limits, OpenWork(work.requests + more.requests, work.tokens + more.tokens))


def _enforce(limits: AnyRow, work: OpenWork) -> None:
    for what, limit, asked in (
        ("requests", limits.max_requests_queued, work.requests),
        ("tokens", limits.max_tokens_queued, work.tokens),
    ):
        if limit is not None and asked > limit:
            raise QuotaExceeded(what, limit, asked)


def _keys(session: Session | Connection, key_id: str | None = None) -> list[KeyView]:
    rows = session.execute(_keys_query(dialect_of(session), key_id is None), {"key_id": key_id})
    return [_view(dict(row._mapping)) for row in rows]


@cache
def _keys_query(dialect: str, every: bool) -> Select[Any]:
    """Return the cached query of one key or of all, with the database's time."""
    query = select(_KEYS, clock(dialect).label("now")).order_by(_KEYS.c.created_at, _KEYS.c.id)
    return query if every else query.where(_KEYS.c.id == bindparam("key_id"))


def _view(columns: dict[str, Any]) -> KeyView:
    now, expires_at = columns.pop("now"), columns["expires_at"]
    expired = isinstance(expires_at, float) and expires_at <= now
    columns["scopes"] = tuple(columns["scopes"])
    return KeyView(**columns, valid=columns["revoked_at"] is None and not expired)
