"""Leader election: one process at a time leads a role, under a lease on the database's clock.

A leader that dies loses the role when its lease expires. A process can be suspended past the end of its lease, so the
work of a leader must stay safe when two processes do it at once.

The table keeps its column names: `office` is the role, `holder` the leader, `term_ends_at` the end of the lease.
"""

from __future__ import annotations

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import database_now, insert_or_ignore
from storage.models import Election


def elect(session: Session, role: str, candidate: str, lease_s: float) -> bool:
    """Acquire or renew the lease of a role; return whether the candidate leads now."""
    now = database_now(session)
    session.execute(insert_or_ignore(session, Election).values(office=role, holder="", term_ends_at=0.0))
    available = or_(Election.holder == candidate, Election.term_ends_at < now)
    elected = session.execute(
        update(Election)
        .where(Election.office == role, available)
        .values(holder=candidate, term_ends_at=now + lease_s)
        .returning(Election.office)
    )
    return elected.first() is not None


def leader(session: Session, role: str) -> str | None:
    """Return the last leader of a role, even if its lease has expired."""
    return session.scalar(select(Election.holder).where(Election.office == role))


def resign(session: Session, role: str, leader: str) -> None:
    """Release the role at once, if this leader has it."""
    session.execute(delete(Election).where(Election.office == role, Election.holder == leader))
