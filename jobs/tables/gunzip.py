"""Unpack gzip data as it arrives, in pieces of bounded size: a few bytes may unpack to gigabytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Final

from jobs.errors import InvalidValue

MAGIC: Final = b"\x1f\x8b"
_PIECE_BYTES: Final = 1 << 18
_GZIP: Final = 31  # wbits of zlib: a gzip header, and the largest window


class Gunzip:
    """Unpacks one gzip stream, which may have several members."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP)
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what these bytes unpack to; raise InvalidValue if they are damaged."""
        while data:
            if self._member.eof:
                data = data.lstrip(b"\0")  # padding between members
                if not data:
                    return
                self._member, self._begun = zlib.decompressobj(_GZIP), False
            self._begun = True
            try:
                piece = self._member.decompress(data, _PIECE_BYTES)
            except zlib.error as exc:
                raise InvalidValue(f"The gzip data is damaged ({exc}). Pack the file again.") from exc
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if piece:
                yield piece

    def end(self) -> None:
        """Check that the data is complete; raise InvalidValue otherwise."""
        if not (self._begun and self._member.eof):
            raise InvalidValue("The gzip data ends early: a part of it is missing. Send it again.")


class MaybeGzip:
    """Passes a file through, unpacked if it begins as gzip data does."""

    def __init__(self) -> None:
        self._head: bytes | None = b""  # until the first bytes are known
        self._gunzip: Gunzip | None = None

    @property
    def is_gzip(self) -> bool:
        """True if the file is gzip data."""
        return self._gunzip is not None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the next bytes of the file."""
        if self._head is not None:
            data = self._head + data
            self._head = data if len(data) < len(MAGIC) else None
            if self._head is not None:
                return
            self._gunzip = Gunzip() if data.startswith(MAGIC) else None
        yield from (data,) if self._gunzip is None else self._gunzip.feed(data)

    def end(self) -> Iterator[bytes]:
        """Yield the last bytes; raise InvalidValue if gzip data is incomplete."""
        if self._head:
            yield self._head
        if self._gunzip is not None:
            self._gunzip.end()


def unpack(data: bytes, max_bytes: int) -> bytes:
    """Return what gzip data unpacks to; raise InvalidValue if it is damaged or larger than `max_bytes`."""
    gunzip, unpacked = Gunzip(), bytearray()
    for piece in gunzip.feed(data):
        unpacked += piece
        if len(unpacked) > max_bytes:
            raise InvalidValue(f"The gzip data unpacks to more than {max_bytes} bytes.")
    gunzip.end()
    return bytes(unpacked)


def without_gz(name: str) -> str:
    """Return the name of a file once it is unpacked."""
    return name[:-3] if PurePath(name).suffix.lower() == ".gz" and len(name) > 3 else name
