"""Call an ASGI application in this process from blocking clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx


class InProcess(httpx.BaseTransport):
    """Pass requests to an ASGI application, one at a time, on its own event loop."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._transport = httpx.ASGITransport(app=app)
        self._runner = asyncio.Runner()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()  # a body that is sent in pieces becomes one that asyncio may read
        return self._runner.run(self._answer(request))

    def close(self) -> None:
        self._runner.close()

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        answer = await self._transport.handle_async_request(request)
        return httpx.Response(answer.status_code, headers=answer.headers, content=await answer.aread())
