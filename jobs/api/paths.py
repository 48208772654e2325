"""Paths as clients and gateways spell them: `/v1/batches/` is `/v1/batches`.

app -> [paths].  Nothing is redirected: a client that follows a redirect may send a POST again without its body.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

_SERVED = "/v1/"


class WithoutLastSlash:
    """Passes a call on without the slash at the end of its path."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap the routes."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        if scope["type"] == "http" and scope["path"].startswith(_SERVED) and scope["path"].endswith("/"):
            scope = dict(scope, path=scope["path"].rstrip("/"))
        await self._app(scope, receive, send)
