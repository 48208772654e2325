"""Normalize paths: `/v1/batches/` and Azure's `/openai/batches` are served as `/v1/batches`; U+0000 is rejected.

Paths are rewritten, not redirected: a client that follows a redirect may repeat a POST without its body.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.api import errors
from jobs.errors import BasicError, InvalidValue, NotFound
from jobs.openai.paths import AZURE_PREFIX, public_path

_PREFIXES = ("/v1/", AZURE_PREFIX)
_DEPLOYMENT = "basic.deployment"  # key of the scope


class PathMiddleware:
    """Removes trailing slashes from `/v1/` paths, and translates the paths and the key header of Azure's clients."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rewrite the path and pass the request on, or reject it."""
        if scope["type"] == "http" and scope["path"].startswith(_PREFIXES):
            refused = _refusal(scope)
            if refused is not None:
                await errors.reply(refused)(scope, receive, send)
                return
            if scope["path"].startswith(AZURE_PREFIX):
                scope["headers"] = _with_bearer_key(scope)
            # In place: the metrics read the route from this scope when the response starts.
            scope["path"], scope[_DEPLOYMENT] = public_path(scope["path"])
        await self._app(scope, receive, send)


def deployment(scope: Scope) -> str | None:
    """Return the model that the path of an Azure client names; None for other paths."""
    named: str | None = scope.get(_DEPLOYMENT)
    return named


def _with_bearer_key(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the headers; the key that Azure's clients send as `api-key` becomes the authorization, if there is none.

    Like `authorization`, no page can make a browser send this header to another site without permission.
    """
    headers = Headers(scope=scope)
    key = headers.get("api-key")
    if key is None or "authorization" in headers:
        return headers.raw
    return [*headers.raw, (b"authorization", b"Bearer " + key.encode("latin-1"))]


def _refusal(scope: Scope) -> BasicError | None:
    """Return an error for U+0000, which PostgreSQL rejects in a text."""
    if "\0" in scope["path"]:
        return NotFound()
    if b"%00" in scope["query_string"]:
        return InvalidValue("The character U+0000 is not allowed in a query.")
    return None
