"""What workers have learned about drafts, by device, target and draft: the next process starts with it.

It changes speed, never a text. Workers of the same kind write one row; the last one wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.dialect import database_now, insert_into
from storage.models import SpeculationStateRow


@dataclass(frozen=True, slots=True)
class DraftIdentity:
    """What a learned state holds for: `key` is a hash of everything that changes what drafts cost and gain."""

    key: str
    device: str
    target: str
    draft: str | None


def read(session: Session, identity: DraftIdentity) -> dict[str, Any] | None:
    """Return the newest state of a draft; None if no worker of this kind has stored one."""
    return session.scalar(select(SpeculationStateRow.state).where(SpeculationStateRow.key == identity.key))


def write(session: Session, identity: DraftIdentity, state: Mapping[str, Any]) -> None:
    """Replace the state of a draft."""
    row = insert_into(session, SpeculationStateRow).values(
        **asdict(identity), state=dict(state), updated_at=database_now(session)
    )
    newer = {"state": row.excluded.state, "updated_at": row.excluded.updated_at}
    session.execute(row.on_conflict_do_update(index_elements=["key"], set_=newer))
