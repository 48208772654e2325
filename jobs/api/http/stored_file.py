"""Read a file of the files API, chunk by chunk. No database connection is held in between."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, cast

from storage import files
from storage.session import Database


def chunks_of(database: Database, file_id: str) -> Iterator[bytes]:
    """Yield the chunks of a file."""
    index = 0
    while True:
        with database.read() as session:
            data = files.chunk(session, file_id, index)
        if data is None:
            return
        yield data
        index += 1


def open_stored(database: Database, file_id: str) -> IO[bytes]:
    """Return a file that reads the chunks as they are needed."""
    return cast(IO[bytes], io.BufferedReader(_Chunks(chunks_of(database, file_id))))


class _Chunks(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]  # typeshed asks for any buffer
        while not len(self._rest):
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)
