"""Create and check API keys. A secret is shown once; the database stores its SHA-256.

A key is `sk-basic-ID-SECRET`. The id, which is not secret, finds the row; the hash of the secret is compared in
constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sqlalchemy import Connection

from jobs.errors import InvalidValue
from storage import keys
from storage.keys import KeyView
from storage.records import NewKey
from storage.session import Database

_PREFIX: Final = "sk-basic-"
_PARTS: Final = re.compile(rf"{_PREFIX}([0-9a-f]{{16}})-([0-9a-f]{{64}})")
_NO_HASH: Final = "0" * 64  # compared with for an unknown id, so that the time does not reveal which ids exist


class Scope(StrEnum):
    """What a key may do."""

    SUBMIT = "submit"  # create, change and cancel its own jobs and files; send completions
    READ = "read"  # read its own jobs and files, and the statistics of the service
    ADMIN = "admin"  # both, for the jobs and files of all keys


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits of a key; None: unlimited."""

    requests_queued: int | None = None
    tokens_queued: int | None = None
    requests_per_minute: int | None = None


def new_key(
    name: str,
    scopes: tuple[Scope, ...],
    limits: KeyLimits,
    lasts_s: float | None = None,
    *,
    given: str | None = None,
) -> tuple[str, NewKey]:
    """Return a key in clear text and as the row to store: a new key, or the one `given`.

    `lasts_s` is its validity in seconds. Raise InvalidValue if `given` is not in the format of a key.
    """
    key = f"{_PREFIX}{secrets.token_hex(8)}-{secrets.token_hex(32)}" if given is None else given
    parts = _PARTS.fullmatch(key)
    if parts is None:
        raise InvalidValue(
            f"a key is {_PREFIX}, 16 hexadecimal digits, a hyphen and 64 more, in lower case", param="--key-file"
        )
    recorded = NewKey(
        id=f"key_{parts[1]}",
        name=name,
        secret_sha256=_hash(parts[2]),
        scopes=tuple(scopes),
        max_requests_queued=limits.requests_queued,
        max_tokens_queued=limits.tokens_queued,
        max_requests_per_minute=limits.requests_per_minute,
        lasts_s=lasts_s,
    )
    return key, recorded


def check_key(database: Database, presented: str) -> KeyView | None:
    """Return the key if it is valid; None if it is unknown, malformed, revoked or expired."""
    with database.connect() as connection:
        return check_key_on(connection, presented)


def check_key_on(connection: Connection, presented: str) -> KeyView | None:
    """Do the same as `check_key` on an open connection."""
    parts = _PARTS.fullmatch(presented)
    if parts is None:
        return None
    key_id, secret = parts[1], parts[2]
    found = keys.find_key(connection, f"key_{key_id}")
    matches = hmac.compare_digest(_hash(secret), _NO_HASH if found is None else found.secret_sha256)
    return found if matches and found is not None and found.valid else None


def same_key(presented: str, key: str) -> bool:
    """Compare two keys in constant time; an empty `key` equals nothing."""
    return bool(key) and hmac.compare_digest(_hash(presented), _hash(key))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
