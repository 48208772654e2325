"""Receive request bodies: small ones in memory, larger ones in a temporary file.

Parsing a body takes several times its size in memory, so large bodies are processed one at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile
from typing import IO

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from jobs.errors import BodyTooLarge

SMALL_BYTES = 256_000  # bodies up to this size stay in memory


class Body:
    """The received bytes of a body and their hash."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(max_size=SMALL_BYTES)  # noqa: SIM115  # closed by BodyReader.received
        self._digest = hashlib.sha256()
        self.size = 0

    def add(self, data: bytes) -> None:
        """Append bytes and hash them; large bodies move to the file."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """SHA-256 of all bytes, in hex."""
        return self._digest.hexdigest()

    def open(self) -> IO[bytes]:
        """Return the bytes as a file, positioned at the start."""
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Delete the bytes and the file that holds them."""
        self._file.close()


async def chunked(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Regroup a stream into chunks of at least `SMALL_BYTES`: large enough to pay for a thread hop each."""
    chunk = bytearray()
    async for data in stream:
        chunk += data
        if len(chunk) >= SMALL_BYTES:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)


class BodyReader:
    """Receives the bodies of one application."""

    def __init__(self) -> None:
        self._large = asyncio.Lock()

    @asynccontextmanager
    async def received(self, request: Request, max_bytes: int) -> AsyncIterator[Body]:
        """Receive a body and yield it; raise BodyTooLarge beyond `max_bytes`.

        A large body is yielded when no other large one is being processed.
        """
        body = Body()
        try:
            async for data in chunked(request.stream()):
                if body.size + len(data) > max_bytes:
                    raise BodyTooLarge(f"The limit for this body type is {max_bytes} bytes; send JSON lines or a file.")
                if len(data) < SMALL_BYTES and not body.size:
                    body.add(data)
                else:  # hashing and disk writes would block the event loop
                    await run_in_threadpool(body.add, data)
            if body.size <= SMALL_BYTES:
                yield body
            else:
                async with self._large:
                    yield body
        finally:
            body.close()
