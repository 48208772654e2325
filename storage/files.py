"""Files of the files API. Their bytes are stored in chunks, so that no process holds a whole file in memory.

A file becomes visible when its last chunk is written. Deletion and expiry hide it at once; `clear_files` deletes its
bytes once no batch reads from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Double, and_, delete, insert, literal, or_, select, tuple_, update
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, database_now, insert_or_ignore, is_one_of, owned_by
from storage.models import ApiKey, File, FileChunk, JobRow
from storage.statuses import UNREAD_JOB_STATUSES

CHUNK_BYTES: Final = 1 << 20
_FILES_PER_DELETE: Final = 20
_CHUNKS_PER_DELETE: Final = 64  # each 1 MiB
ABANDONED_S: Final = 86_400.0  # an upload that is unfinished after this time is abandoned


@dataclass(frozen=True, slots=True)
class FileView:
    """Metadata of a visible file: one that is complete and neither deleted nor expired."""

    id: str
    purpose: str
    filename: str
    bytes: int
    created_at: float
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class FileViewPage:
    """A page of the list of files; `has_more`: files follow it."""

    files: tuple[FileView, ...]
    has_more: bool


_FILE_COLUMNS: Final = (File.id, File.purpose, File.filename, File.bytes, File.created_at, File.expires_at)


def begin_file(session: Session, file_id: str, purpose: str, filename: str, owner: str) -> None:
    """Begin an invisible file; an earlier unfinished one with this id loses its chunks."""
    row = {"id": file_id, "purpose": purpose, "filename": filename, "api_key_id": owner, "status": "writing"}
    session.execute(
        insert_or_ignore(session, File).values(**row, bytes=0, created_at=database_now(session), expires_at=None)
    )
    session.execute(delete(FileChunk).where(FileChunk.file_id == file_id))


def append_chunk(session: Session, file_id: str, index: int, data: bytes) -> None:
    """Write the next chunk of an unfinished file."""
    session.execute(insert(FileChunk).values(file_id=file_id, chunk_index=index, data=data))


def finish_file(session: Session, file_id: str, size: int, expires_after_s: float | None, purpose: str) -> None:
    """Make a completely written file visible, and set its `created_at` to now. Its key may allow less time."""
    now = database_now(session)
    allowed = select(ApiKey.files_kept_s).join(File, File.api_key_id == ApiKey.id).where(File.id == file_id)
    times = [lasts_s for lasts_s in (expires_after_s, session.scalar(allowed)) if lasts_s is not None]
    expires_at = now + min(times) if times else None
    shown = {"status": "ready", "bytes": size, "created_at": now, "expires_at": expires_at, "purpose": purpose}
    session.execute(update(File).where(File.id == file_id, File.status == "writing").values(**shown))


def drop_file(session: Session, file_id: str) -> None:
    """Delete an unfinished file."""
    if session.scalar(select(File.id).where(File.id == file_id, File.status == "writing")) is not None:
        session.execute(delete(FileChunk).where(FileChunk.file_id == file_id))
        session.execute(delete(File).where(File.id == file_id))


def delete_file(session: Session, file_id: str, owner: str | None = None) -> bool:
    """Delete a file and return whether it existed."""
    gone = update(File).where(_is_visible(database_now(session)), File.id == file_id, owned_by(File.api_key_id, owner))
    return session.execute(gone.values(status="deleted").returning(File.id)).first() is not None


def file(session: Session, file_id: str, owner: str | None = None, *, lock: bool = False) -> FileView | None:
    """Return a visible file, or None; `lock` prevents its deletion until the transaction ends."""
    query = select(*_FILE_COLUMNS).where(File.id == file_id, owned_by(File.api_key_id, owner))
    query = query.where(_is_visible(database_now(session)))
    row = session.execute(query.with_for_update(key_share=True) if lock else query).first()
    return None if row is None else _file_view(row)


def files(
    session: Session,
    limit: int,
    after: str | None = None,
    owner: str | None = None,
    *,
    purpose: str | None = None,
    newest_first: bool = True,
) -> FileViewPage | None:
    """Return up to `limit` files after the file `after`, which may be deleted; None if it never existed."""
    query = select(*_FILE_COLUMNS).where(_is_visible(database_now(session)), owned_by(File.api_key_id, owner))
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    if after is not None:
        cursor = select(File.created_at, File.id).where(
            File.id == after, owned_by(File.api_key_id, owner), File.status != "writing"
        )
        if (last := session.execute(cursor).first()) is None:
            return None
        key, bound = tuple_(File.created_at, File.id), tuple_(*last)
        query = query.where(key < bound if newest_first else key > bound)
    columns = (File.created_at, File.id)
    rows = session.execute(
        query.order_by(*(c.desc() if newest_first else c.asc() for c in columns)).limit(limit + 1)
    ).all()
    return FileViewPage(tuple(_file_view(row) for row in rows[:limit]), has_more=len(rows) > limit)


def chunk(session: Session, file_id: str, index: int) -> bytes | None:
    """Return the bytes of one chunk; None after the last."""
    return session.scalar(select(FileChunk.data).where(FileChunk.file_id == file_id, FileChunk.chunk_index == index))


def clear_files(session: Session) -> int:
    """Delete some bytes of deleted, expired and abandoned files that no batch reads; return how many files it touched.

    One call deletes a few chunks, so that other writers wait no longer: call it again until it returns 0.
    """
    now = database_now(session)
    ended = or_(
        File.status == "deleted",
        and_(File.status == "ready", File.expires_at <= now),
        and_(File.status == "writing", File.created_at < now - ABANDONED_S),
    )
    in_use = select(JobRow.input_file_id).where(
        JobRow.status.in_(UNREAD_JOB_STATUSES), JobRow.validated_at.is_(None), JobRow.input_file_id.is_not(None)
    )
    free = select(File.id).where(ended, File.id.not_in(in_use)).order_by(File.id).limit(_FILES_PER_DELETE)
    ids = list(session.scalars(free.with_for_update(skip_locked=True)))
    if ids:
        clear_chunks(session, ids)
    return len(ids)


def clear_chunks(session: Session, ids: Sequence[str]) -> bool:
    """Delete some chunks of hidden files, and the names of files that have none left; return whether all are done."""
    some = select(FileChunk.file_id, FileChunk.chunk_index).where(FileChunk.file_id.in_(ids)).limit(_CHUNKS_PER_DELETE)
    keys = [(row.file_id, row.chunk_index) for row in session.execute(some)]
    if keys:
        session.execute(delete(FileChunk).where(is_one_of((FileChunk.file_id, FileChunk.chunk_index), keys)))
    left = set(session.scalars(select(FileChunk.file_id).where(FileChunk.file_id.in_(ids)).distinct()))
    done = [file_id for file_id in ids if file_id not in left]
    session.execute(update(File).where(File.id.in_(done)).values(status="cleared", filename=""))
    return not left


def hide_old_files(session: Session, older_than_s: float | None) -> int:
    """Delete the files that were created longer ago; None: than their key allows. Return how many."""
    kept_s = select(ApiKey.files_kept_s).where(ApiKey.id == File.api_key_id).scalar_subquery()
    age_s = kept_s if older_than_s is None else literal(older_than_s, Double())
    old = update(File).where(File.status == "ready", File.created_at < database_now(session) - age_s)
    return len(session.scalars(old.values(status="deleted").returning(File.id)).all())


def _is_visible(now: float) -> ColumnElement[bool]:
    return and_(File.status == "ready", or_(File.expires_at.is_(None), File.expires_at > now))


def _file_view(row: AnyRow) -> FileView:
    return FileView(**row._mapping)
