"""Copies of a SQLite database, and what makes a restored database ready for new processes."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import delete, exists, func, inspect, or_, select, text, update
from sqlalchemy.orm import Session

from storage.dialect import clock, database_now, dialect_of
from storage.models import ApiKey, Base, Election, File, JobRow, Request, Worker
from storage.records import HEARTBEAT_TIMEOUT_S
from storage.session import make_engine, write_connection
from storage.statuses import FINAL_JOB_STATUSES
from storage.steps.view import UNPACKED, drop_step_view
from storage.views import drop_views

SQLITE_MAGIC: Final = b"SQLite format 3\0"
_VERSION_TABLE: Final = "alembic_version"


class NoBackup(Exception):
    """A file that is no database of bASIC, or a damaged one; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a database holds."""

    jobs: int
    open_jobs: int
    files: int
    keys: int

    @property
    def is_empty(self) -> bool:
        """Whether nothing would be lost with the database."""
        return not (self.jobs or self.files or self.keys)


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database in one transaction, beside writers; the copy is one file, without a journal.

    Raise OSError and sqlite3.Error. The target must not exist: a copy that fails leaves nothing there.
    """
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        with closing(_open(source, "ro")) as original, closing(sqlite3.connect(part)) as copy:
            original.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)


def restore_sqlite(source: Path, target: Path) -> None:
    """Replace the contents of a database by those of a copy, in one transaction. Raise sqlite3.Error."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not target.exists():
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with closing(_open(source, "ro")) as copy, closing(_open(target, "rw")) as database:
        copy.backup(database)


def sqlite_revision(file: Path) -> str:
    """Return the schema revision of a copy; raise NoBackup if it is damaged or holds no schema of bASIC."""
    try:
        with closing(_open(file, "ro")) as copy:
            (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise NoBackup(f"it is damaged ({found})")
            revision = copy.execute(f"SELECT version_num FROM {_VERSION_TABLE}").fetchone()
    except sqlite3.Error as error:
        raise NoBackup(str(error)) from error
    if revision is None:
        raise NoBackup("it has no schema of bASIC")
    return str(revision[0])


def contents(session: Session) -> Contents:
    """Count the jobs, files and keys of a database."""

    def count(*conditions: object, of: type[Base]) -> int:
        return int(session.scalar(select(func.count()).select_from(of).where(*conditions)) or 0)  # type: ignore[arg-type]

    return Contents(
        jobs=count(of=JobRow),
        open_jobs=count(JobRow.status.not_in(FINAL_JOB_STATUSES), of=JobRow),
        files=count(File.status == "ready", of=File),
        keys=count(of=ApiKey),
    )


def is_in_use(session: Session) -> bool:
    """Return whether a worker or an API server runs on this database, or was killed a few seconds ago."""
    now = clock(dialect_of(session))
    alive = exists().where(
        Worker.stopped_at.is_(None), Worker.lost_at.is_(None), Worker.last_seen_at > now - HEARTBEAT_TIMEOUT_S
    )
    return bool(session.scalar(select(or_(alive, exists().where(Election.term_ends_at > now)))))


def release_all(session: Session) -> int:
    """Return all running requests to the queue, as a worker does that stops, and close the rows of workers and leaders.

    Their attempts do not count and their committed tokens stay. Return the number of requests.
    """
    released = session.execute(
        update(Request)
        .where(Request.status == "running")
        .values(status="queued", attempts=Request.attempts - 1, lease_owner=None, lease_expires_at=None)
        .returning(Request.job_id)
    ).all()
    running = (Worker.stopped_at.is_(None), Worker.lost_at.is_(None))
    session.execute(update(Worker).where(*running).values(stopped_at=database_now(session)))
    session.execute(delete(Election))
    return len(released)


def overdue_jobs(session: Session) -> int:
    """Return the number of open jobs whose completion window has passed: they end as expired."""
    overdue = (JobRow.status.not_in(FINAL_JOB_STATUSES), JobRow.expires_at < database_now(session))
    return int(session.scalar(select(func.count()).select_from(JobRow).where(*overdue)) or 0)


def drop_tables(url: str) -> None:
    """Drop all tables, views and functions of bASIC in a PostgreSQL database, and nothing else."""
    engine = make_engine(url)
    try:
        with write_connection(engine) as connection:
            drop_views(connection)
            drop_step_view(connection)
            ours = {*Base.metadata.tables, UNPACKED, _VERSION_TABLE}
            for name in ours.intersection(inspect(connection).get_table_names()):
                connection.execute(text(f"DROP TABLE {name} CASCADE"))
    finally:
        engine.dispose()


def _open(file: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, timeout=10.0, isolation_level=None)
