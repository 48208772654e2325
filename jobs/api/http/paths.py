"""Addresses as clients and gateways spell them: `/v1/batches/` is `/v1/batches`; one with U+0000 is refused.

Nothing is redirected: a client that follows a redirect may send a POST again without its body.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.api import errors
from jobs.errors import BasicError, InvalidValue, NotFound

_SERVED = "/v1/"


class PathMiddleware:
    """Passes a call on without the slash at the end of its path."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap the routes."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        if scope["type"] == "http" and scope["path"].startswith(_SERVED):
            refused = _refusal(scope)
            if refused is not None:
                await errors.reply(refused)(scope, receive, send)
                return
            if scope["path"].endswith("/"):
                scope = dict(scope, path=scope["path"].rstrip("/"))
        await self._app(scope, receive, send)


def _refusal(scope: Scope) -> BasicError | None:
    """Return what is wrong with an address that PostgreSQL can't look for."""
    if "\0" in scope["path"]:
        return NotFound()
    if b"%00" in scope["query_string"]:
        return InvalidValue("The character U+0000 is not allowed in a query.")
    return None
