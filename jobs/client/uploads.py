"""Upload large files in parts, and continue an interrupted upload of the same content.

What has arrived is remembered in a small file of the user's state directory, named by a hash of content and service.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from platformdirs import user_state_path

from jobs.errors import NotFound

PARTED_BYTES: Final = 32 << 20  # files from this size on are sent in parts
PART_BYTES: Final = 16 << 20

Call = Callable[..., Awaitable[dict[str, Any]]]  # AsyncClient's: method, path, arguments of httpx


@dataclass(slots=True)
class UploadState:
    """What a later attempt needs: the upload, the ids of its parts in order, and the key of the submission."""

    upload_id: str = ""
    part_ids: list[str] = field(default_factory=list)
    idempotency_key: str = field(default_factory=lambda: str(uuid.uuid4()))


class ResumedUpload:
    """One upload of one content to one service."""

    def __init__(self, call: Call, api_url: str, file: IO[bytes]) -> None:
        self._call = call
        self._file = file
        self.size, self._md5, digest = _digests(file)
        name = hashlib.sha256(f"{api_url} {digest}".encode()).hexdigest()
        self._path = user_state_path("basic") / "uploads" / f"{name}.json"
        self.state = _read(self._path)

    async def run(self) -> str:
        """Send what has not arrived, and return the id of the file."""
        upload = await self._begun()
        if upload["status"] == "pending":
            arrived = {part["id"] for part in upload["parts"]}
            for number in range(-(-self.size // PART_BYTES)):
                await self._send(number, arrived)
            body = {"part_ids": self.state.part_ids, "md5": self._md5}
            upload = await self._call("POST", f"/v1/uploads/{self.state.upload_id}/complete", json=body)
        return str(upload["file"]["id"])

    def forget(self) -> None:
        """Delete the state: the file has been used."""
        self._path.unlink(missing_ok=True)

    async def _begun(self) -> dict[str, Any]:
        """Return the upload of an earlier attempt if it can be continued, else a new one."""
        if self.state.upload_id:
            try:
                upload = await self._call("GET", f"/v1/uploads/{self.state.upload_id}")
                if upload["status"] == "pending" or upload["file"] is not None:
                    return upload
            except NotFound:
                pass
        body = {"filename": "requests.jsonl", "purpose": "batch", "bytes": self.size}
        upload = await self._call("POST", "/v1/uploads", json=body)
        self.state.upload_id, self.state.part_ids = upload["id"], []
        self._write()
        return upload

    async def _send(self, number: int, arrived: set[str]) -> None:
        """Send one part, unless it has arrived."""
        known = self.state.part_ids[number : number + 1]
        if known and known[0] in arrived:
            return
        self._file.seek(number * PART_BYTES)
        data = self._file.read(PART_BYTES)
        part = await self._call("POST", f"/v1/uploads/{self.state.upload_id}/parts", files={"data": data})
        self.state.part_ids[number:] = [part["id"]]
        self._write()

    def _write(self) -> None:
        """Write the state, or do without: then an interrupted upload starts over."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = self._path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(asdict(self.state)))
            part.replace(self._path)
        except OSError:
            pass


def _digests(file: IO[bytes]) -> tuple[int, str, str]:
    """Return the size of a file, its MD5 and its SHA-256."""
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    file.seek(0)
    while data := file.read(1 << 20):
        md5.update(data)
        sha256.update(data)
        size += len(data)
    return size, md5.hexdigest(), sha256.hexdigest()


def _read(path: Path) -> UploadState:
    try:
        return UploadState(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return UploadState()
