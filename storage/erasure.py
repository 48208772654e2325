"""Erase jobs: hide a job at once, then delete its rows in small transactions, beside running services.

`erased_at` hides the job from callers. Its prompts, texts and steps go in pieces of a few hundred requests, its files
in pieces of some chunks, and its own row last, by the pruner: what is interrupted continues. A job that still runs is
erased when it has ended. A file goes with it unless another job reads it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from storage.dialect import database_now
from storage.files import clear_chunks
from storage.models import ChoiceOutput, File, JobRow, PackedSteps, Request, UploadRow
from storage.session import Database
from storage.statuses import FINAL_JOB_STATUSES
from storage.transitions import request_cancel

REQUESTS_PER_DELETE: Final = 200
_JOBS_AT_ONCE: Final = 100
_CHECKPOINT_WAIT_MS: Final = 200


def hide_job(session: Session, job_id: str) -> None:
    """Hide a job from callers, and its verifications, which hold its prompts and texts: they will be erased.

    Its idempotency key is free again, and it gets no more work.
    """
    now = database_now(session)
    hidden = {"erased_at": now, "idempotency_key": None, "compared_at": func.coalesce(JobRow.compared_at, now)}
    its_own = or_(JobRow.id == job_id, JobRow.verification_of == job_id)
    session.execute(update(JobRow).where(its_own, JobRow.erased_at.is_(None)).values(**hidden))
    for verification_id in session.scalars(select(JobRow.id).where(JobRow.verification_of == job_id)).all():
        request_cancel(session, verification_id)


def hidden_jobs(session: Session) -> list[str]:
    """Return the ids of some hidden jobs that have ended."""
    ended = (JobRow.erased_at.is_not(None), JobRow.status.in_(FINAL_JOB_STATUSES))
    return list(session.scalars(select(JobRow.id).where(*ended).order_by(JobRow.erased_at).limit(_JOBS_AT_ONCE)))


def erase_job(database: Database, job_id: str) -> Generator[int]:
    """Delete a hidden job that has ended; yield the number of requests that each transaction deleted.

    Stopped in between, it continues with the next call.
    """
    yield from erase_contents(database, job_id)
    with database.write() as session:
        session.execute(delete(JobRow).where(JobRow.id == job_id, JobRow.erased_at.is_not(None)))
    yield 0


def erase_contents(database: Database, job_id: str) -> Generator[int]:
    """Do the same as `erase_job`, but leave the job's row: the pruner finds it, and calls `forget_deleted`."""
    with database.read() as session:
        columns = select(JobRow.input_file_id, JobRow.output_file_id, JobRow.error_file_id, JobRow.source_file_id)
        row = session.execute(columns.where(JobRow.id == job_id, JobRow.erased_at.is_not(None))).first()
    if row is None:
        return
    for file_id in dict.fromkeys(file_id for file_id in row if file_id is not None):
        yield from _erase_file(database, file_id, job_id)
    yield from _erase_requests(database, job_id)


def _erase_requests(database: Database, job_id: str) -> Iterator[int]:
    """Delete the requests of a job, and what belongs to them, in pieces along the primary key."""
    while True:
        with database.write() as session:
            first = select(Request.request_index).where(Request.job_id == job_id).order_by(Request.request_index)
            indexes = session.scalars(first.limit(REQUESTS_PER_DELETE)).all()
            if not indexes:
                return
            last = indexes[-1]
            # Without these two, the cascade would look up each request's rows on its own.
            for model in (ChoiceOutput, PackedSteps):
                session.execute(delete(model).where(model.job_id == job_id, model.request_index <= last))
            session.execute(delete(Request).where(Request.job_id == job_id, Request.request_index <= last))
        yield len(indexes)


def _erase_file(database: Database, file_id: str, job_id: str) -> Iterator[int]:
    """Hide a file that no other job reads, then delete its bytes and its name."""
    with database.write() as session:
        session.execute(select(File.id).where(File.id == file_id).with_for_update())  # no batch can begin with it now
        others = select(JobRow.id).where(JobRow.id != job_id, JobRow.erased_at.is_(None), _reads(file_id))
        if session.scalar(others.limit(1)) is not None:
            return
        session.execute(update(File).where(File.id == file_id, File.status == "ready").values(status="deleted"))
        session.execute(delete(UploadRow).where(UploadRow.file_id == file_id))
    while True:
        with database.write() as session:
            cleared = clear_chunks(session, [file_id])
        yield 0
        if cleared:
            return


def _reads(file_id: str) -> ColumnElement[bool]:
    return or_(
        and_(JobRow.input_file_id.is_not(None), JobRow.input_file_id == file_id),
        and_(JobRow.source_file_id.is_not(None), JobRow.source_file_id == file_id),
    )


def forget_deleted(database: Database) -> bool:
    """Empty SQLite's write-ahead log, which holds deleted rows; return False if a reader keeps it: call again later.

    The pages of the database file are overwritten by each deletion (`secure_delete`). PostgreSQL overwrites deleted
    rows when it vacuums.
    """
    if database.engine.dialect.name != "sqlite":
        return True
    with database.engine.connect() as connection:
        cursor = connection.connection.cursor()
        (wait_ms,) = cursor.execute("PRAGMA busy_timeout").fetchone() or (0,)
        cursor.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_WAIT_MS}")  # writers wait meanwhile
        try:
            busy, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() or (0,)
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {wait_ms}")
            cursor.close()
    return not busy
