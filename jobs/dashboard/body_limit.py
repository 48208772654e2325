"""Bodies sent to the pages: short, and read before anything works on them.

A log-in is a key, and all else a page sends goes over its socket. Anyone may call these routes, so what they take must
cost nothing.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.api import errors
from jobs.dashboard.layout import BASE
from jobs.errors import BasicError, BodyTooLarge, BodyTooSlow

FORM_BYTES: Final = 4_096  # of a form: far more than a key has
SOCKET_BYTES: Final = 1_000_000  # of a message of a page's socket: it carries the prompts of a new job
_SOCKET: Final = f"{BASE}/_nicegui_ws/"
_WHOLE_S: Final = 15.0  # within which a body must have come


class DashboardBodyLimit:
    """Reads the body of each call to the pages before the call is passed on, and refuses one that is long or slow."""

    def __init__(self, app: ASGIApp, whole_s: float = _WHOLE_S) -> None:
        self._app = app
        self._whole_s = whole_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on with its whole body, or answer 413 or 408."""
        if scope["type"] != "http" or not (scope["path"] == BASE or scope["path"].startswith(f"{BASE}/")):
            await self._app(scope, receive, send)
            return
        most = SOCKET_BYTES if scope["path"].startswith(_SOCKET) else FORM_BYTES
        try:
            async with asyncio.timeout(self._whole_s):
                body = await _read(Headers(scope=scope), receive, most)
        except BasicError as refused:
            await errors.reply(refused)(scope, receive, send)
        except TimeoutError:
            await errors.reply(BodyTooSlow())(scope, receive, send)
        else:
            await self._app(scope, receive if body is None else _given(body, receive), send)


async def _read(headers: Headers, receive: Receive, most: int) -> bytes | None:
    """Return a body; None if the caller is gone. Raise BodyTooLarge: by the length that is told, if one is."""
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        more = message.get("more_body", False)
    return bytes(body)


def _given(body: bytes, receive: Receive) -> Receive:
    """Return what tells a body that was read before, and then what `receive` tells."""
    told = False

    async def given() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has more than the {most} bytes that may be sent here.")
