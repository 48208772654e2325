"""Routes of uploads, in OpenAI's format: begin, send parts, complete, cancel; and read, to continue one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from jobs.api.auth.caller import Caller, CurrentCaller
from jobs.api.dependencies import CurrentServices, Services
from jobs.api.http.body import chunked
from jobs.api.http.multipart import UploadForm, read_expires_after_s
from jobs.api.routes.file_writer import FileWriter
from jobs.api.schemas.openapi import COMPLETE_BODY, ERRORS, PART_BODY, PARTED_UPLOAD_BODY
from jobs.api.schemas.route_responses import responses
from jobs.api.schemas.uploads import UploadPartReply, UploadReply, part, upload
from jobs.api.submissions import json_object, require_json
from jobs.api.write_threads import run_write
from jobs.errors import BodyTooLarge, InvalidValue, MissingParameter, NotFound, UploadEnded
from jobs.submission.values import clean_text, refuse_unknown, shown
from jobs.tables.gunzip import MAGIC
from storage import files, uploads
from storage.uploads import Upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], responses=ERRORS)

_MAX_PART_BYTES: Final = 64 << 20
_MAX_PARTS: Final = 10_000
_MAX_BODY_BYTES: Final = 1 << 20  # a part id has 37 characters
_DAY_S: Final = 86_400.0


@router.post("", response_model=None, openapi_extra=PARTED_UPLOAD_BODY, responses=responses(UploadReply, 400, 413))
async def begin(request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Begin an upload. Its parts are kept for a day."""
    fields = await _json(request, services)
    refuse_unknown(fields, {"filename", "purpose", "bytes", "mime_type", "expires_after"})
    size, limit = _size(fields.get("bytes")), services.settings.max_file_bytes
    if size > limit:
        raise BodyTooLarge(f"The file is larger than the limit of {limit} bytes.", param="bytes")
    if fields.get("purpose") != "batch":
        raise InvalidValue(f"must be batch, not {shown(fields.get('purpose'))}", param="purpose")
    name, lifetime_s = _filename(fields.get("filename")), _lifetime_s(fields.get("expires_after"), services)
    upload_id = f"upload_{secrets.token_hex(16)}"

    def write() -> Response:
        with services.database.write() as session:
            uploads.begin_upload(session, upload_id, name, "batch", size, caller.key_id, lifetime_s)
            return JSONResponse(upload(_found(session, upload_id, caller), None))

    return await run_write(write)


@router.get("/{upload_id}", response_model=None, responses=responses(UploadReply, 404))
def retrieve(upload_id: str, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Read an upload and the parts that have arrived."""
    with services.database.read() as session:
        found = _found(session, upload_id, caller)
        file = None if found.file_id is None else files.file(session, found.file_id, caller.sees)
    return JSONResponse(upload(found, file))


@router.post(
    "/{upload_id}/parts",
    response_model=None,
    openapi_extra=PART_BODY,
    responses=responses(UploadPartReply, 400, 404, 409, 413),
)
async def add_part(upload_id: str, request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Send the bytes of a part, at most 64 MiB. Parts may arrive in any order, and several at once."""
    form = UploadForm(request.headers.get("content-type", ""), _MAX_PART_BYTES, "data")
    writer = FileWriter(services, caller, f"part_{secrets.token_hex(16)}", unpack=False)

    def record() -> Response:
        form.end()
        writer.end(form)
        with services.database.write() as session:
            found = _pending(session, upload_id, caller)
            if len(found.parts) == _MAX_PARTS:
                raise InvalidValue(f"An upload has at most {_MAX_PARTS} parts. Send larger ones.", param="data")
            added = uploads.add_part(session, upload_id, writer.file_id, writer.size, writer.chunks)
        return JSONResponse(part(added, upload_id))

    try:
        await run_write(_check_pending, services, upload_id, caller)
        async for data in chunked(request.stream()):
            await run_write(writer.take, form, data)
        return await run_write(record)
    except BaseException:
        await run_write(writer.drop)
        raise


@router.post(
    "/{upload_id}/complete",
    response_model=None,
    openapi_extra=COMPLETE_BODY,
    responses=responses(UploadReply, 400, 404, 409, 413),
)
async def complete(upload_id: str, request: Request, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Make the file from its parts, in the order of `part_ids`. May be repeated: the first call decides."""
    fields = await _json(request, services)
    refuse_unknown(fields, {"part_ids", "md5"})
    part_ids, md5 = fields.get("part_ids"), fields.get("md5")
    if not isinstance(part_ids, list) or not part_ids or not all(isinstance(one, str) for one in part_ids):
        raise InvalidValue("must be a list of the ids of parts", param="part_ids")
    if md5 is not None and not isinstance(md5, str):
        raise InvalidValue("must be the MD5 digest of the file, in hex", param="md5")
    return await run_write(_complete, services, upload_id, part_ids, md5, caller)


@router.post("/{upload_id}/cancel", response_model=None, responses=responses(UploadReply, 404, 409))
async def cancel(upload_id: str, services: CurrentServices, caller: CurrentCaller) -> Response:
    """Cancel an upload and delete its parts."""

    def write() -> Response:
        with services.database.write() as session:
            uploads.cancel_upload(session, _pending(session, upload_id, caller))
            return JSONResponse(upload(_found(session, upload_id, caller), None))

    return await run_write(write)


def _complete(services: Services, upload_id: str, part_ids: list[str], md5: str | None, caller: Caller) -> Response:
    with services.database.write() as session:
        found = _found(session, upload_id, caller, lock=True)
        if found.status != "completed":
            _require_pending(found)
            _check_parts(session, found, part_ids, md5)
            uploads.complete_upload(session, found, part_ids, f"file-{secrets.token_hex(16)}")
            found = _found(session, upload_id, caller)
        file = files.file(session, found.file_id or "", caller.sees)
    return JSONResponse(upload(found, file))


def _check_parts(session: Session, found: Upload, part_ids: list[str], md5: str | None) -> None:
    sizes, seen = {one.id: one.bytes for one in found.parts}, set[str]()
    for index, part_id in enumerate(part_ids):
        if part_id not in sizes or part_id in seen:
            why = "is given twice" if part_id in sizes else "is not a part of this upload"
            raise InvalidValue(f"{part_id[:80]!r} {why}.", param=f"part_ids[{index}]")
        seen.add(part_id)
    if (total := sum(sizes[part_id] for part_id in part_ids)) != found.bytes:
        raise InvalidValue(f"The parts have {total} bytes; {found.bytes} were announced.", param="part_ids")
    if (files.chunk(session, part_ids[0], 0) or b"").startswith(MAGIC):
        raise InvalidValue("The file is packed (gzip). Unpack it, or send it to /v1/files.", param="part_ids")
    if md5 is not None and (own := uploads.md5_of(session, part_ids)) != md5.lower():
        raise InvalidValue(f"The parts have the digest {own}: a part was damaged. Send it again.", param="md5")


def _check_pending(services: Services, upload_id: str, caller: Caller) -> None:
    with services.database.read() as session:
        _require_pending(_found(session, upload_id, caller))


def _pending(session: Session, upload_id: str, caller: Caller) -> Upload:
    found = _found(session, upload_id, caller, lock=True)
    _require_pending(found)
    return found


def _require_pending(found: Upload) -> None:
    if found.status != "pending":
        raise UploadEnded(f"The upload is {found.status}; begin another one.", param="id")


def _found(session: Session, upload_id: str, caller: Caller, *, lock: bool = False) -> Upload:
    found = uploads.upload(session, upload_id, caller.sees, lock=lock)
    if found is None:
        raise NotFound(f"There is no upload {upload_id[:80]!r}.", param="id")
    return found


async def _json(request: Request, services: Services) -> dict[str, Any]:
    require_json(request.headers)
    async with services.bodies.received(request, _MAX_BODY_BYTES) as body:
        return json_object(body.open().read())


def _size(size: Any) -> int:
    if size is None:
        raise MissingParameter("Missing field bytes, the size of the file.", param="bytes")
    if type(size) is not int or size < 1:
        raise InvalidValue(f"must be a whole number above 0, not {shown(size)}", param="bytes")
    return size


def _filename(name: Any) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= 255:
        raise InvalidValue("must be a string of 1 to 255 characters", param="filename")
    return clean_text(name.replace("\\", "/").rpartition("/")[2], "filename") or "file"


def _lifetime_s(expires_after: Mapping[str, Any] | None, services: Services) -> float:
    if expires_after is None:
        return services.settings.file_days * _DAY_S
    if not isinstance(expires_after, dict):
        raise InvalidValue("must be an object with anchor and seconds", param="expires_after")
    return read_expires_after_s(expires_after.get("anchor"), expires_after.get("seconds"), "expires_after")
