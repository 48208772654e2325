"""Normalize paths: `/v1/batches/` is served as `/v1/batches`; U+0000 in a path or query is rejected.

Paths are rewritten, not redirected: a client that follows a redirect may repeat a POST without its body.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.api import errors
from jobs.errors import BasicError, InvalidValue, NotFound

_PREFIX = "/v1/"


class PathMiddleware:
    """Removes trailing slashes from `/v1/` paths."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rewrite the path and pass the request on, or reject it."""
        if scope["type"] == "http" and scope["path"].startswith(_PREFIX):
            refused = _refusal(scope)
            if refused is not None:
                await errors.reply(refused)(scope, receive, send)
                return
            if scope["path"].endswith("/"):
                scope = dict(scope, path=scope["path"].rstrip("/"))
        await self._app(scope, receive, send)


def _refusal(scope: Scope) -> BasicError | None:
    """Return an error for U+0000, which PostgreSQL rejects in a text."""
    if "\0" in scope["path"]:
        return NotFound()
    if b"%00" in scope["query_string"]:
        return InvalidValue("The character U+0000 is not allowed in a query.")
    return None
