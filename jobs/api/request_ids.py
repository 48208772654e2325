"""Give every request an id, in the `x-request-id` header of its response and in its log lines."""

from __future__ import annotations

import re
import secrets
from typing import cast

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.logs import bind_log_context

REQUEST_ID_HEADER = "x-request-id"
# Log only what looks like a job id: clients choose the rest of the path, and its length.
_JOB_PATH = re.compile(r"/v1/(?:jobs|batches)/(?P<job>[A-Za-z0-9_-]{1,64})(?:/|$)")


def request_id(scope: Scope) -> str:
    """Return the id of the request; create it at the first call."""
    return cast(str, scope.setdefault("basic.request_id", f"req_{secrets.token_hex(12)}"))


class RequestIdMiddleware:
    """Adds `x-request-id` to every response, and request and job ids to log lines."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with an id."""

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id(scope)
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Not reset at the end: uvicorn logs exceptions of routes later. Each request has its own context.
        bind_log_context(request_id=request_id(scope), **_job_of(scope["path"]))
        await self._app(scope, receive, send_with_id)


def _job_of(path: str) -> dict[str, str]:
    found = _JOB_PATH.match(path)
    return {} if found is None else {"job_id": found["job"]}
