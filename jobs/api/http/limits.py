"""Limit the size of request bodies and the time they may take to arrive.

Bytes are counted as they come, so a chunked body has the same limit as one with Content-Length.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import BodyTooLarge, BodyTooSlow, UnsupportedBody


class BodyLimitMiddleware:
    """Rejects bodies that are too large, too slow or compressed. The error is raised where the route reads the body.

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
        declared = headers.get("content-length", "")
        encoding = headers.get("content-encoding", "identity")
        read = 0
        complete = False
        began_at = time.monotonic()

        async def limited() -> Message:
            nonlocal read, complete
            if complete:  # from here on the route waits for a disconnect, which may take long
                return await receive()
            if encoding != "identity":
                raise UnsupportedBody("Compressed bodies are not supported; send the body uncompressed.")
            if declared.isdecimal():
                _check_size(max_bytes, int(declared))
            timeout_s = began_at + self._idle_s + read / self._min_bytes_per_s - time.monotonic()
            message = await self._receive(receive, min(self._idle_s, timeout_s))
            read += len(message.get("body", b""))
            _check_size(max_bytes, read)
            complete = not message.get("more_body", False)
            return message

        return limited

    async def _receive(self, receive: Receive, timeout_s: float) -> Message:
        try:
            return await asyncio.wait_for(receive(), timeout_s)
        except TimeoutError as exc:
            raise BodyTooSlow from exc


def _check_size(max_bytes: int, size: int) -> None:
    if size > max_bytes:
        raise BodyTooLarge(f"The body is larger than the limit of {max_bytes} bytes.")
