"""Limit the size of request bodies and the time they may take to arrive.

Bytes are counted as they come, so a chunked body has the same limit as one with Content-Length, and a gzip body the
same limit once it is unpacked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import BodyTooLarge, BodyTooSlow, UnsupportedBody
from jobs.tables.gunzip import Gunzip

_GZIP: Final = frozenset({"gzip", "x-gzip"})
_NONE: Final = frozenset({"identity", ""})


class BodyLimitMiddleware:
    """Rejects bodies that are too large, too slow or in another encoding than gzip, where the route reads the body.

    A body is too slow if no byte arrives for `idle_s`, or if its mean rate stays below `min_bytes_per_s` after that:
    a client that sends one byte every few seconds must not hold a connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        idle_s: float = 30.0,
        min_bytes_per_s: float = 1_000,
        max_bytes_by_path: Mapping[str, int] | None = None,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._most_by_path = max_bytes_by_path or {}
        self._idle_s = idle_s
        self._min_bytes_per_s = min_bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a limited body."""
        if scope["type"] == "http":
            max_bytes = self._most_by_path.get(scope.get("path", ""), self._max_bytes)
            receive = self._limited(Headers(scope=scope), receive, max_bytes)
        await self._app(scope, receive, send)

    def _limited(self, headers: Headers, receive: Receive, max_bytes: int) -> Receive:
        encoding = headers.get("content-encoding", "identity").strip().lower()
        body = _Body(receive, max_bytes, headers.get("content-length", ""), self._idle_s, self._min_bytes_per_s)
        if encoding in _GZIP:
            return _UnpackedBody(body, max_bytes).receive
        if encoding not in _NONE:
            body.refusal = UnsupportedBody(
                f"Bodies in the encoding {encoding[:40]!r} are not supported; send gzip, or the body uncompressed."
            )
        return body.receive


class _Body:
    """Receives the bytes of a body as they are sent."""

    def __init__(self, receive: Receive, max_bytes: int, declared: str, idle_s: float, min_bytes_per_s: float) -> None:
        self.refusal: UnsupportedBody | None = None  # raised when the body is read
        self.complete = False
        self._receive = receive
        self._max_bytes = max_bytes
        self._declared = declared
        self._idle_s = idle_s
        self._min_bytes_per_s = min_bytes_per_s
        self._read = 0
        self._began_at = time.monotonic()

    async def receive(self) -> Message:
        """Return the next part of the body; raise if it is too large or too slow."""
        if self.complete:  # from here on the route waits for a disconnect, which may take long
            return await self._receive()
        if self.refusal is not None:
            raise self.refusal
        if self._declared.isdecimal():
            _check_size(self._max_bytes, int(self._declared))
        timeout_s = self._began_at + self._idle_s + self._read / self._min_bytes_per_s - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), min(self._idle_s, timeout_s))
        except TimeoutError as exc:
            raise BodyTooSlow from exc
        self._read += len(message.get("body", b""))
        _check_size(self._max_bytes, self._read)
        self.complete = not message.get("more_body", False)
        return message


class _UnpackedBody:
    """Unpacks a gzip body, in pieces, up to the same size limit."""

    def __init__(self, packed: _Body, max_bytes: int) -> None:
        self._packed = packed
        self._max_bytes = max_bytes
        self._gunzip = Gunzip()
        self._pieces: Iterator[bytes] = iter(())
        self._unpacked = 0
        self._complete = False

    async def receive(self) -> Message:
        """Return the next piece of the body; raise if it is too large, too slow or damaged."""
        if self._complete:
            return await self._packed.receive()
        while (piece := next(self._pieces, None)) is None:
            if self._packed.complete:
                self._gunzip.end()
                self._complete = True
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await self._packed.receive()
            if message["type"] != "http.request":
                return message
            self._pieces = self._gunzip.feed(message.get("body", b""))
        self._unpacked += len(piece)
        _check_size(self._max_bytes, self._unpacked)
        return {"type": "http.request", "body": piece, "more_body": True}


def _check_size(max_bytes: int, size: int) -> None:
    if size > max_bytes:
        raise BodyTooLarge(f"The body is larger than the limit of {max_bytes} bytes.")
