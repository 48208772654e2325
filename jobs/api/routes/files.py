"""Routes of files, in OpenAI's format: upload, list, read, download, delete.

Uploads and downloads move between client and database in chunks; no file is in memory as a whole.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.dependencies import CurrentServices, Services
from jobs.api.http.body import chunked
from jobs.api.http.multipart import UploadForm
from jobs.api.schemas import serializers
from jobs.api.schemas.openapi import ERRORS, UPLOAD_BODY
from jobs.api.schemas.replies import FileDeleted, FilePage, FileReply
from jobs.api.schemas.route_responses import BYTES, responses
from jobs.api.write_threads import run_write
from jobs.client.gunzip import MaybeGzip, without_gz
from jobs.errors import InvalidValue, NotFound
from storage import files
from storage.files import CHUNK_BYTES, FileView

router = APIRouter(prefix="/v1/files", tags=["files"], responses=ERRORS)

_DAY_S = 86_400.0


@router.post("", response_model=None, openapi_extra=UPLOAD_BODY, responses=responses(FileReply, 400, 413))
async def upload(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Upload a file. It is visible once complete; its lines are validated when a batch is created from it."""
    form = UploadForm(request.headers.get("content-type", ""), services.settings.max_file_bytes)
    writer = _UploadWriter(services, caller, f"file-{secrets.token_hex(16)}")
    try:
        async for data in chunked(request.stream()):
            await run_write(writer.take, form, data)
        form.end()
        return await run_write(writer.finish, form)
    except BaseException:
        await run_write(writer.drop)
        raise


@router.get("", response_model=None, responses=responses(FilePage, 400))
def list_files(
    services: CurrentServices,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: Annotated[str | None, Query(max_length=128)] = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """List files by creation time, newest first unless `order` is `asc`. `after`: last id of the page before."""
    with services.database.read() as session:
        page = files.files(session, limit, after or None, caller.sees, purpose=purpose, newest_first=order == "desc")
    if page is None:
        raise InvalidValue("Unknown file id in `after`.", param="after")
    return JSONResponse(serializers.page([serializers.file(file) for file in page.files], page.has_more))


def _existing_file(file_id: str, services: CurrentServices, caller: CurrentCaller) -> FileView:
    with services.database.read() as session:
        file = files.file(session, file_id, caller.sees)
    if file is None:
        raise _no_file(file_id)
    return file


ExistingFile = Annotated[FileView, Depends(_existing_file)]


@router.get("/{file_id}", response_model=None, responses=responses(FileReply, 404))
def retrieve(file: ExistingFile) -> Response:
    """Read the metadata of one file."""
    return JSONResponse(serializers.file(file))


@router.delete("/{file_id}", response_model=None, responses=responses(FileDeleted, 404))
async def delete(file_id: str, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Delete a file. A batch that was created from it continues."""
    if not await run_write(_delete, services, file_id, caller):
        raise _no_file(file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=BYTES)
def content(file: ExistingFile, services: CurrentServices) -> StreamingResponse:
    """Download a file."""
    headers = {"content-length": str(file.bytes), "x-content-type-options": "nosniff"}
    return StreamingResponse(_chunks(services, file.id), media_type="application/octet-stream", headers=headers)


def _delete(services: Services, file_id: str, caller: Caller) -> bool:
    with services.database.write() as session:
        return files.delete_file(session, file_id, caller.sees)


class _UploadWriter:
    """Writes one upload, one transaction per chunk: a slow client must not hold the write lock.

    A gzip file is stored unpacked, so that a batch reads its lines and the limit counts what it holds.
    """

    def __init__(self, services: Services, caller: Caller, file_id: str) -> None:
        self._services = services
        self._caller = caller
        self._file_id = file_id
        self._file = MaybeGzip()
        self._pending = bytearray()
        self._size = self._chunks = 0

    def take(self, form: UploadForm, data: bytes) -> None:
        """Parse the next bytes of the body, and write the chunks that are complete."""
        form.feed(data)
        packed = bytes(form.pending)
        form.pending.clear()
        self._store(form, self._file.feed(packed))

    def finish(self, form: UploadForm) -> Response:
        """Write the rest, make the file visible and return it."""
        purpose = form.purpose()
        expires_after_s = form.expires_after_s() or self._services.settings.file_days * _DAY_S
        self._store(form, self._file.end())
        if self._pending or not self._chunks:
            self._write(form, len(self._pending))
        with self._services.database.write() as session:
            files.finish_file(session, self._file_id, self._size, expires_after_s, purpose)
            file = files.file(session, self._file_id)
        assert file is not None
        return JSONResponse(serializers.file(file))

    def _store(self, form: UploadForm, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            self._pending += piece
            self._size += len(piece)
            form.check_size(self._size)
            while len(self._pending) >= CHUNK_BYTES:
                self._write(form, CHUNK_BYTES)

    def _write(self, form: UploadForm, size: int) -> None:
        data = bytes(self._pending[:size])
        del self._pending[:size]
        name = form.filename or ""
        with self._services.database.write() as session:
            if not self._chunks:
                stored = without_gz(name) if self._file.is_gzip else name
                files.begin_file(session, self._file_id, "batch", stored, self._caller.key_id)
            files.append_chunk(session, self._file_id, self._chunks, data)
        self._chunks += 1

    def drop(self) -> None:
        """Delete the chunks of an upload that failed."""
        if self._chunks:
            with self._services.database.write() as session:
                files.drop_file(session, self._file_id)


def _chunks(services: Services, file_id: str) -> Iterator[bytes]:
    """Yield the chunks of a file. No database connection is held while the client reads."""
    index = 0
    while True:
        with services.database.read() as session:
            data = files.chunk(session, file_id, index)
        if data is None:
            return
        yield data
        index += 1


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id[:80]!r}.", param="id")
