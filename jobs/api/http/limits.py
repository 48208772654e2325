"""What is held before and around every route: a request id, the size of a body, and the time it may take to arrive.

Plain ASGI: counts bytes as they come, so that a body without Content-Length has the same limit as one with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import BodyTooLarge, BodyTooSlow, UnsupportedBody


class BodyLimitMiddleware:
    """Refuses bodies that are too large, too slow or compressed. The refusal rises where a route reads the body.

    Slow is: nothing for `idle_s`, or after that fewer than `min_bytes_per_s` in the mean, so that a byte now and then
    keeps no connection.
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
        """Pass the request on with a body that is watched."""
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
            if complete:  # what comes now is the wait for a disconnect: it may last
                return await receive()
            if encoding != "identity":
                raise UnsupportedBody("Compressed bodies are not supported; send the body as it is.")
            if declared.isdecimal():
                _check_size(max_bytes, int(declared))
            patience_s = began_at + self._idle_s + read / self._min_bytes_per_s - time.monotonic()
            message = await self._in_time(receive, min(self._idle_s, patience_s))
            read += len(message.get("body", b""))
            _check_size(max_bytes, read)
            complete = not message.get("more_body", False)
            return message

        return limited

    async def _in_time(self, receive: Receive, patience_s: float) -> Message:
        try:
            return await asyncio.wait_for(receive(), patience_s)
        except TimeoutError as exc:
            raise BodyTooSlow from exc


def _check_size(max_bytes: int, size: int) -> None:
    if size > max_bytes:
        raise BodyTooLarge(f"The body has more than the {max_bytes} bytes one submission may have.")
