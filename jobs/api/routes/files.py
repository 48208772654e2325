"""Routes of files, in OpenAI's format: upload, list, read, download, delete.

Uploads and downloads move between client and database in chunks; no file is in memory as a whole.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.dependencies import CurrentServices, Services
from jobs.api.http.body import chunked
from jobs.api.http.multipart import UploadForm
from jobs.api.http.stored_file import chunks_of
from jobs.api.routes.file_writer import FileWriter
from jobs.api.schemas import serializers
from jobs.api.schemas.openapi import ERRORS, UPLOAD_BODY
from jobs.api.schemas.replies import FileDeleted, FilePage, FileReply
from jobs.api.schemas.route_responses import BYTES, responses
from jobs.api.write_threads import run_write
from jobs.errors import InvalidValue, NotFound
from storage import files
from storage.files import FileView

router = APIRouter(prefix="/v1/files", tags=["files"], responses=ERRORS)

_DAY_S = 86_400.0


@router.post("", response_model=None, openapi_extra=UPLOAD_BODY, responses=responses(FileReply, 400, 413))
async def upload(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Upload a file. It is visible once complete; its lines are validated when a batch is created from it."""
    form = UploadForm(request.headers.get("content-type", ""), services.settings.max_file_bytes)
    writer = FileWriter(services, caller, f"file-{secrets.token_hex(16)}", unpack=True)
    try:
        async for data in chunked(request.stream()):
            await run_write(writer.take, form, data)
        form.end()
        return await run_write(_finish, services, writer, form)
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
    return StreamingResponse(
        chunks_of(services.database, file.id), media_type="application/octet-stream", headers=headers
    )


def _delete(services: Services, file_id: str, caller: Caller) -> bool:
    with services.database.write() as session:
        return files.delete_file(session, file_id, caller.sees)


def _finish(services: Services, writer: FileWriter, form: UploadForm) -> Response:
    """Write the rest, make the file visible and return it."""
    purpose = form.purpose()
    expires_after_s = form.expires_after_s() or services.settings.file_days * _DAY_S
    writer.end(form)
    with services.database.write() as session:
        files.finish_file(session, writer.file_id, writer.size, expires_after_s, purpose)
        file = files.file(session, writer.file_id)
    assert file is not None
    return JSONResponse(serializers.file(file))


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id[:80]!r}.", param="id")
