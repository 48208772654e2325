"""The body of a call, received: in memory while it is small, in a file beyond that, and never larger than it may be.

What is made of a large body takes many times its size for a moment, so large ones are worked on one at a time.
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

SMALL_BYTES = 256_000


class Body:
    """The bytes of a body, to be read once."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._file = SpooledTemporaryFile(max_size=SMALL_BYTES)  # noqa: SIM115  # closed by whoever received it
        self._digest = hashlib.sha256()
        self.size = 0

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Hash of all bytes."""
        return self._digest.hexdigest()

    def open(self) -> IO[bytes]:
        """Return the bytes as a file, from their beginning."""
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Forget the bytes."""
        self._file.close()


async def chunked(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what comes in pieces of a quarter of a megabyte: each is worth the way to a thread."""
    piece = bytearray()
    async for data in stream:
        piece += data
        if len(piece) >= SMALL_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


class BodyReader:
    """Receives bodies for one application."""

    def __init__(self) -> None:
        """Start with none."""
        self._large = asyncio.Lock()

    @asynccontextmanager
    async def received(self, request: Request, max_bytes: int) -> AsyncIterator[Body]:
        """Yield the body of a request, a large one when no other is worked on.

        Raise BodyTooLarge beyond `max_bytes` bytes.
        """
        body = Body()
        try:
            async for data in chunked(request.stream()):
                if body.size + len(data) > max_bytes:
                    raise BodyTooLarge(f"The limit for this body type is {max_bytes} bytes; send JSON lines or a file.")
                if len(data) < SMALL_BYTES and not body.size:
                    body.add(data)
                else:  # hashing and run_write to a disk take time, for which the others need not wait
                    await run_in_threadpool(body.add, data)
            if body.size <= SMALL_BYTES:
                yield body
            else:
                async with self._large:
                    yield body
        finally:
            body.close()
