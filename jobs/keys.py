"""Keys: how they are made and looked at. The secret is shown once; the record has its hash.

Knows no HTTP. A key is `sk-basic-ID-SECRET`: its row is found by the id, which is no secret, and the secret's hash is
compared in constant time.
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
_NOBODY: Final = "0" * 64  # compared with where there is no such key, so that this takes no less time


class Scope(StrEnum):
    """What a key may do."""

    SUBMIT = "submit"  # make, change and cancel its own jobs and files; ask for single answers
    READ = "read"  # see its own jobs and files, and the numbers of the service
    ADMIN = "admin"  # both, for the jobs and files of everybody


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a key may have and ask for; None: as much as it likes."""

    requests_queued: int | None = None
    tokens_queued: int | None = None
    requests_per_minute: int | None = None


def new_key(
    name: str,
    scopes: tuple[Scope, ...],
    limits: Limits,
    lasts_s: float | None = None,
    *,
    given: str | None = None,
) -> tuple[str, NewKey]:
    """Return a key as its holder sends it, and as it is recorded: a new one, or the one `given`.

    Raise InvalidValue if what is given is no key of ours.
    """
    key = f"{_PREFIX}{secrets.token_hex(8)}-{secrets.token_hex(32)}" if given is None else given
    parts = _PARTS.fullmatch(key)
    if parts is None:
        raise InvalidValue(
            f"a key is {_PREFIX}, 16 hexadecimal digits, a hyphen and 64 of them, in lower case", param="--key-file"
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
    """Return the key that was presented, or None if it opens nothing: unknown, malformed, revoked and expired alike."""
    with database.connect() as connection:
        return key_among(connection, presented)


def key_among(connection: Connection, presented: str) -> KeyView | None:
    """Do the same for those who have a connection."""
    parts = _PARTS.fullmatch(presented)
    if parts is None:
        return None
    key_id, secret = parts[1], parts[2]
    found = keys.find_key(connection, f"key_{key_id}")
    right = hmac.compare_digest(_hash(secret), _NOBODY if found is None else found.secret_sha256)
    return found if right and found is not None and found.opens else None


def same_key(presented: str, key: str) -> bool:
    """Compare two keys in constant time; the empty one is none."""
    return bool(key) and hmac.compare_digest(_hash(presented), _hash(key))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
