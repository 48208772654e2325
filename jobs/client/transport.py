"""The two ways over which calls go to the service: connections for asyncio, and connections that block.

Both have the same coroutines, so that the client is written once. Those of BlockingWire never suspend: `finish` runs
them, and what waits for nothing else, without an event loop and without a thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import httpx

T = TypeVar("T")

_SILENCE_S = 60.0  # the server sends a comment every 15 s, so a stream that is silent for so long is dead


class Refusal(Exception):
    """The service answered a call for a stream with an error."""

    def __init__(self, response: httpx.Response) -> None:
        """Keep the answer; it is read."""
        self.response = response


class Wire(Protocol):
    """A way to the service."""

    headers: Mapping[str, str]  # of every call

    async def close(self) -> None:
        """Close all connections."""

    async def send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Return the whole answer to a call; raise httpx.TransportError if there is none."""

    def texts(self, path: str, params: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncGenerator[str]:
        """Yield the text of an answer as it comes; raise Refusal if it is an error."""

    async def pause(self, seconds: float) -> None:
        """Let so much time pass."""

    async def aside(self, work: Callable[[], T]) -> T:
        """Return what a function returns that may take a while."""


class AsyncWire:
    """Connections for asyncio."""

    def __init__(self, api_url: str, headers: Mapping[str, str], transport: httpx.AsyncBaseTransport | None) -> None:
        """Connect lazily."""
        self.headers = headers
        self._http = httpx.AsyncClient(base_url=api_url, headers=headers, timeout=_timeout(), transport=transport)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Return the whole answer to a call."""
        return await self._http.request(method, path, **arguments)

    async def texts(self, path: str, params: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncGenerator[str]:
        """Yield the text of an answer as it comes."""
        async with self._http.stream("GET", path, params=params, headers=headers) as response:
            if response.is_error:
                await response.aread()
                raise Refusal(response)
            async for text in response.aiter_text():
                yield text

    async def pause(self, seconds: float) -> None:
        """Sleep; other tasks run meanwhile."""
        await asyncio.sleep(seconds)

    async def aside(self, work: Callable[[], T]) -> T:
        """Run the function in a thread; other tasks run meanwhile."""
        return await asyncio.to_thread(work)


class BlockingWire:
    """Connections that block the thread which uses them. Threads may share them; a process that forks has its own."""

    def __init__(self, api_url: str, headers: Mapping[str, str], transport: httpx.BaseTransport | None) -> None:
        """Connect lazily."""
        self.headers = headers
        self._connect = partial(
            httpx.Client, base_url=api_url, headers=headers, timeout=_timeout(), transport=transport
        )
        self._http, self._pid = self._connect(), os.getpid()

    def _here(self) -> httpx.Client:
        """Return the connections of this process: answers to a fork must not come to its parent."""
        if self._pid != os.getpid():
            self._http, self._pid = self._connect(), os.getpid()
        return self._http

    async def close(self) -> None:
        """Close all connections."""
        self._here().close()

    async def send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Return the whole answer to a call."""
        return self._here().request(method, path, **arguments)

    async def texts(self, path: str, params: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncGenerator[str]:
        """Yield the text of an answer as it comes."""
        with self._here().stream("GET", path, params=params, headers=headers) as response:
            if response.is_error:
                response.read()
                raise Refusal(response)
            for text in response.iter_text():
                yield text

    async def pause(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    async def aside(self, work: Callable[[], T]) -> T:
        """Run the function here: what it iterates over may belong to this thread."""
        return work()


def finish(call: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends and return its result."""
    try:
        call.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    call.close()
    raise RuntimeError("This call waits for an event loop; make it with AsyncClient.")


def _timeout() -> httpx.Timeout:
    return httpx.Timeout(_SILENCE_S, connect=5.0)
