"""Uploads: files that arrive in parts. A part is kept as an unfinished file until the upload is completed or abandoned.

Completing moves the chunks of the parts to one file, without copying their bytes through a process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from storage import files
from storage.dialect import database_now, owned_by
from storage.files import ABANDONED_S
from storage.models import File, FileChunk, UploadPartRow, UploadRow


@dataclass(frozen=True, slots=True)
class UploadPart:
    """A part that has arrived."""

    id: str
    bytes: int
    created_at: float


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload with the parts that have arrived, in the order of their arrival."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: float
    expires_at: float
    status: str  # pending, completed, cancelled or expired
    file_id: str | None
    file_expires_after_s: float | None
    parts: tuple[UploadPart, ...]


def begin_upload(
    session: Session, upload_id: str, filename: str, purpose: str, size: int, owner: str, expires_after_s: float | None
) -> None:
    """Begin an upload of `size` bytes, whose parts are kept for a day."""
    now = database_now(session)
    session.execute(
        insert(UploadRow).values(
            id=upload_id,
            filename=filename,
            purpose=purpose,
            bytes=size,
            api_key_id=owner,
            status="pending",
            file_expires_after_s=expires_after_s,
            created_at=now,
            expires_at=now + ABANDONED_S,
        )
    )


def upload(session: Session, upload_id: str, owner: str | None = None, *, lock: bool = False) -> Upload | None:
    """Return an upload, or None; `lock` holds off other calls that change it until the transaction ends."""
    query = select(UploadRow).where(UploadRow.id == upload_id, owned_by(UploadRow.api_key_id, owner))
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        return None
    found = session.execute(
        select(UploadPartRow.id, UploadPartRow.bytes, UploadPartRow.created_at)
        .where(UploadPartRow.upload_id == upload_id)
        .order_by(UploadPartRow.created_at, UploadPartRow.id)
    )
    expired = row.status == "pending" and row.expires_at <= database_now(session)
    return Upload(
        id=row.id,
        filename=row.filename,
        purpose=row.purpose,
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        status="expired" if expired else row.status,
        file_id=row.file_id,
        file_expires_after_s=row.file_expires_after_s,
        parts=tuple(UploadPart(*part) for part in found),
    )


def add_part(session: Session, upload_id: str, part_id: str, size: int, chunks: int) -> UploadPart:
    """Record a part whose chunks are written."""
    now = database_now(session)
    session.execute(
        insert(UploadPartRow).values(id=part_id, upload_id=upload_id, bytes=size, chunks=chunks, created_at=now)
    )
    return UploadPart(part_id, size, now)


def md5_of(session: Session, part_ids: Iterable[str]) -> str:
    """Return the MD5 digest, in hex, of the bytes of parts."""
    digest = hashlib.md5(usedforsecurity=False)
    for part_id in part_ids:
        index = 0
        while (data := files.chunk(session, part_id, index)) is not None:
            digest.update(data)
            index += 1
    return digest.hexdigest()


def complete_upload(session: Session, found: Upload, part_ids: Sequence[str], file_id: str) -> None:
    """Make the file of an upload from its parts, in the given order, and forget the other parts."""
    owner = session.scalars(select(UploadRow.api_key_id).where(UploadRow.id == found.id)).one()
    rows = session.execute(select(UploadPartRow.id, UploadPartRow.chunks).where(UploadPartRow.upload_id == found.id))
    chunks = {row.id: row.chunks for row in rows}
    files.begin_file(session, file_id, found.purpose, found.filename, owner)
    offset = 0
    for part_id in part_ids:
        moved = {"file_id": file_id, "chunk_index": FileChunk.chunk_index + offset}
        session.execute(update(FileChunk).where(FileChunk.file_id == part_id).values(moved))
        offset += chunks[part_id]
    files.finish_file(session, file_id, found.bytes, found.file_expires_after_s, found.purpose)
    _drop_parts(session, found)
    session.execute(update(UploadRow).where(UploadRow.id == found.id).values(status="completed", file_id=file_id))


def cancel_upload(session: Session, found: Upload) -> None:
    """Cancel an upload and delete its parts."""
    _drop_parts(session, found)
    session.execute(update(UploadRow).where(UploadRow.id == found.id).values(status="cancelled"))


def _drop_parts(session: Session, found: Upload) -> None:
    ids = [part.id for part in found.parts]
    session.execute(delete(FileChunk).where(FileChunk.file_id.in_(ids)))
    session.execute(delete(File).where(File.id.in_(ids)))
    session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id == found.id))
