"""Limit the size and duration of bodies sent to the dashboard.

Anyone may call these routes without a key, so a body is small and read completely before it is processed: the log-in
form has one key, and the socket carries everything else but submitted files.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.api import errors
from jobs.dashboard.session import BASE, SUBMIT_PATH
from jobs.errors import BasicError, BodyTooLarge, BodyTooSlow

FORM_BYTES: Final = 4_096  # of a form; a key is far shorter
SOCKET_BYTES: Final = 1_000_000  # of a socket message, which may have the prompts of a new job
_SOCKET: Final = f"{BASE}/_nicegui_ws/"
_TIMEOUT_S: Final = 15.0  # for a whole body


class DashboardBodyLimit:
    """Reads the whole body of a call to the dashboard before passing the call on; rejects large and slow bodies."""

    def __init__(self, app: ASGIApp, timeout_s: float = _TIMEOUT_S) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on with its whole body, or answer 413 or 408."""
        if scope["type"] != "http" or not _is_ours(scope["path"]):
            await self._app(scope, receive, send)
            return
        max_bytes = SOCKET_BYTES if scope["path"].startswith(_SOCKET) else FORM_BYTES
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await _read(Headers(scope=scope), receive, max_bytes)
        except BasicError as refused:
            await errors.reply(refused)(scope, receive, send)
        except TimeoutError:
            await errors.reply(BodyTooSlow())(scope, receive, send)
        else:
            await self._app(scope, receive if body is None else _replay(body, receive), send)


def _is_ours(path: str) -> bool:
    """Return whether a path is of the dashboard, except that of submitted files: its route reads within limits."""
    return path != SUBMIT_PATH and (path == BASE or path.startswith(f"{BASE}/"))


async def _read(headers: Headers, receive: Receive, max_bytes: int) -> bytes | None:
    """Return a body; None if the client disconnected. Raise BodyTooLarge, by Content-Length if possible."""
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first returns the body already read, then calls the original."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has more than the {max_bytes} bytes that this page accepts.")
