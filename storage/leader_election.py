"""Elections: an office that one process at a time holds, for a term, on the database's clock.

A holder that dies loses the office when its term is over. Whoever holds an office should still do nothing that two
could not do at once: a process may sleep through the end of its term.
"""

from __future__ import annotations

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import database_now, insert_or_ignore
from storage.models import Election


def elect(session: Session, office: str, candidate: str, term_s: float) -> bool:
    """Return whether the candidate holds the office now: it had it, or nobody does; a new term begins then."""
    now = database_now(session)
    session.execute(insert_or_ignore(session, Election).values(office=office, holder="", term_ends_at=0.0))
    vacant = or_(Election.holder == candidate, Election.term_ends_at < now)
    elected = session.execute(
        update(Election)
        .where(Election.office == office, vacant)
        .values(holder=candidate, term_ends_at=now + term_s)
        .returning(Election.office)
    )
    return elected.first() is not None


def leader(session: Session, office: str) -> str | None:
    """Return who holds the office, in term or not."""
    return session.scalar(select(Election.holder).where(Election.office == office))


def resign(session: Session, office: str, holder: str) -> None:
    """Leave the office to whoever comes next, if it is held."""
    session.execute(delete(Election).where(Election.office == office, Election.holder == holder))
