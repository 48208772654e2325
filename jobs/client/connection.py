"""HTTP connections of the client: one for asyncio, one that blocks.

Both have the same coroutines, so that the client is written once. The coroutines of BlockingConnection never suspend:
`run_without_loop` runs them without an event loop and without a thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from functools import partial
from typing import IO, Any, Protocol, TypeVar

import httpx

T = TypeVar("T")

_READ_TIMEOUT_S = 60.0  # the server sends a comment every 15 s, so a stream without data for 60 s is dead
_CONNECT_TIMEOUT_S = 5.0
_PIECE_BYTES = 1 << 18


class ErrorResponse(Exception):
    """The service answered the request for a stream with an error."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response  # its body has been read


class FileContent:
    """The content of a request: a head, and a file that is read in pieces, from its start for each attempt."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head = head
        self._file = file
        self.size = len(head) + file.seek(0, os.SEEK_END)

    def pieces(self) -> Iterator[bytes]:
        """Yield the content."""
        self._file.seek(0)
        if self._head:
            yield self._head
        while piece := self._file.read(_PIECE_BYTES):
            yield piece

    async def async_pieces(self) -> AsyncGenerator[bytes]:
        """Yield the content; a thread reads the file."""
        pieces = self.pieces()
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece


class Connection(Protocol):
    """What the client needs of a connection to the service."""

    headers: Mapping[str, str]  # sent with every request

    async def close(self) -> None:
        """Close all connections."""

    async def send(
        self, method: str, path: str, *, file: FileContent | None = None, **arguments: Any
    ) -> httpx.Response:
        """Send a request and return the whole response; raise httpx.TransportError if none comes."""

    def stream_text(self, path: str, params: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncGenerator[str]:
        """Yield the text of a response as it arrives; raise ErrorResponse if it is an error."""

    async def sleep(self, seconds: float) -> None:
        """Wait for this many seconds."""

    async def run_slow(self, function: Callable[[], T]) -> T:
        """Return the result of a function that may block for long."""


class AsyncConnection:
    """A connection for asyncio. It connects with the first request."""

    def __init__(self, api_url: str, headers: Mapping[str, str], transport: httpx.AsyncBaseTransport | None) -> None:
        self.headers = headers
        self._http = httpx.AsyncClient(base_url=api_url, headers=headers, timeout=_timeout(), transport=transport)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def send(
        self, method: str, path: str, *, file: FileContent | None = None, **arguments: Any
    ) -> httpx.Response:
        """Send the request without blocking the event loop; return the whole response."""
        if file is not None:
            arguments = _with_content(arguments, file, file.async_pieces())
        return await self._http.request(method, path, **arguments)

    async def stream_text(
        self, path: str, params: Mapping[str, Any], headers: Mapping[str, str]
    ) -> AsyncGenerator[str]:
        """Yield the text of a response as it arrives."""
        async with self._http.stream("GET", path, params=params, headers=headers) as response:
            if response.is_error:
                await response.aread()
                raise ErrorResponse(response)
            async for text in response.aiter_text():
                yield text

    async def sleep(self, seconds: float) -> None:
        """Sleep; other tasks run meanwhile."""
        await asyncio.sleep(seconds)

    async def run_slow(self, function: Callable[[], T]) -> T:
        """Run the function in a thread; other tasks run meanwhile."""
        return await asyncio.to_thread(function)


class BlockingConnection:
    """A connection that blocks its thread. Threads may share it; a forked process opens its own connections."""

    def __init__(self, api_url: str, headers: Mapping[str, str], transport: httpx.BaseTransport | None) -> None:
        self.headers = headers
        self._connect = partial(
            httpx.Client, base_url=api_url, headers=headers, timeout=_timeout(), transport=transport
        )
        self._http, self._pid = self._connect(), os.getpid()

    def _process_http(self) -> httpx.Client:
        """Return the connections of this process: a fork that used its parent's would mix up their responses."""
        if self._pid != os.getpid():
            self._http, self._pid = self._connect(), os.getpid()
        return self._http

    async def close(self) -> None:
        """Close all connections."""
        self._process_http().close()

    async def send(
        self, method: str, path: str, *, file: FileContent | None = None, **arguments: Any
    ) -> httpx.Response:
        """Send the request and block until the whole response is there."""
        if file is not None:
            arguments = _with_content(arguments, file, file.pieces())
        return self._process_http().request(method, path, **arguments)

    async def stream_text(
        self, path: str, params: Mapping[str, Any], headers: Mapping[str, str]
    ) -> AsyncGenerator[str]:
        """Yield the text of a response as it arrives."""
        with self._process_http().stream("GET", path, params=params, headers=headers) as response:
            if response.is_error:
                response.read()
                raise ErrorResponse(response)
            for text in response.iter_text():
                yield text

    async def sleep(self, seconds: float) -> None:
        """Block this thread."""
        time.sleep(seconds)

    async def run_slow(self, function: Callable[[], T]) -> T:
        """Run the function in this thread: the iterator that it reads may belong to it."""
        return function()


def run_without_loop(call: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends and return its result."""
    try:
        call.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    call.close()
    raise RuntimeError("This call needs an event loop; make it with AsyncClient.")


def _with_content(arguments: dict[str, Any], file: FileContent, pieces: object) -> dict[str, Any]:
    headers = {**arguments.get("headers", {}), "content-length": str(file.size)}
    return {**arguments, "headers": headers, "content": pieces}


def _timeout() -> httpx.Timeout:
    return httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
