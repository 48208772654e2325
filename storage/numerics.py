"""What fixes the bits of texts, by fingerprint: `numerics` in outputs and workers names a row here.

A fingerprint is a hash of its parts (worker.loading.numerics), so a row never changes. Rows outlive their workers: an
output must say for years what computed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.dialect import database_now, insert_or_ignore
from storage.models import NumericsRow

UNKNOWN: Final = "unknown"  # in place of the fingerprint of a worker of an older version
_SEPARATOR: Final = ","


@dataclass(frozen=True, slots=True)
class Numerics:
    """Everything that fixes the bits of a text, by name, and the fingerprint of it all."""

    fingerprint: str
    parts: Mapping[str, Any]


def record(session: Session, numerics: Numerics) -> None:
    """Store the parts of a fingerprint, if they are not there yet."""
    row = {"fingerprint": numerics.fingerprint, "parts": dict(numerics.parts), "created_at": database_now(session)}
    session.execute(insert_or_ignore(session, NumericsRow).values(row))


def find(session: Session, fingerprint: str) -> Numerics | None:
    """Return the parts of a fingerprint; None if no worker has reported it."""
    parts = session.scalar(select(NumericsRow.parts).where(NumericsRow.fingerprint == fingerprint))
    return None if parts is None else Numerics(fingerprint, parts)


def joined(fingerprints: Iterable[str | None]) -> str | None:
    """Return the value of a `numerics` column: the distinct fingerprints that a text was computed under, in order.

    More than one: it was resumed where other bits were possible. None: no worker has named any.
    """
    distinct = dict.fromkeys(part for one in fingerprints for part in fingerprints_of(one or UNKNOWN))
    return None if distinct.keys() <= {UNKNOWN} else _SEPARATOR.join(distinct)


def fingerprints_of(column: str) -> list[str]:
    """Return the fingerprints in a `numerics` column, in the order in which they computed the text."""
    return column.split(_SEPARATOR)
