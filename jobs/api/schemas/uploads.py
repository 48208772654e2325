"""Response models of /v1/uploads, in OpenAI's shapes, and the bodies of uploads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from jobs.api.schemas import serializers
from jobs.api.schemas.replies import FileReply
from storage.files import FileView
from storage.uploads import Upload, UploadPart


class UploadPartReply(BaseModel):
    """A part of an upload that has arrived."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str
    bytes: int


class UploadReply(BaseModel):
    """A file that arrives in parts."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileReply | None
    parts: list[UploadPartReply]


def upload(found: Upload, file: FileView | None) -> dict[str, Any]:
    """Return an upload; its parts are an addition to OpenAI's fields, with which a client continues."""
    return {
        "id": found.id,
        "object": "upload",
        "bytes": found.bytes,
        "created_at": int(found.created_at),
        "expires_at": int(found.expires_at),
        "filename": found.filename,
        "purpose": found.purpose,
        "status": found.status,
        "file": None if file is None else serializers.file(file),
        "parts": [part(one, found.id) for one in found.parts],
    }


def part(found: UploadPart, upload_id: str) -> dict[str, Any]:
    """Return a part of an upload."""
    return {
        "id": found.id,
        "object": "upload.part",
        "created_at": int(found.created_at),
        "upload_id": upload_id,
        "bytes": found.bytes,
    }
