"""A test client of an ASGI application that hands each reply over to the test once.

The client of starlette starts a thread and an event loop per client, or even per request, and crosses threads nine
times per reply: that took a third of the time of the API's tests.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextvars import copy_context
from functools import cache
from queue import SimpleQueue
from typing import Any, Self
from urllib.parse import unquote

import anyio
import httpx2
from starlette.testclient import TestClient, _TestClientTransport
from starlette.types import ASGIApp, Message

_PORTS = {"http": 80, "https": 443}


class ApiClient(TestClient):
    """starlette's client, on an event loop that all clients of the process share."""

    def __init__(self, app: ASGIApp, **options: Any) -> None:
        super().__init__(app, **options)
        given = self._transport
        assert isinstance(given, _TestClientTransport)
        self._transport = _Transport(
            given.app,
            given.portal_factory,
            given.raise_server_exceptions,
            given.root_path,
            client=given.client,
            app_state=self.app_state,
        )
        self._lifespan = _Lifespan()

    def __enter__(self) -> Self:
        _host().wait_for(self._lifespan.start(self.app, self.app_state))
        return self

    def __exit__(self, *args: Any) -> None:
        self._transport.close()
        _host().wait_for(self._lifespan.end())


class _Host:
    """An event loop in a thread. When its last user leaves, the tasks that are left end, as if the loop ended."""

    def __init__(self) -> None:
        started: SimpleQueue[asyncio.AbstractEventLoop] = SimpleQueue()

        async def main() -> None:
            self._main = asyncio.current_task()
            started.put(asyncio.get_running_loop())
            await asyncio.Event().wait()

        threading.Thread(target=asyncio.run, args=(main(),), name="api-client", daemon=True).start()
        self.loop = started.get()
        self._users = 0

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the loop, with the context of this thread."""
        self.loop.call_soon_threadsafe(asyncio.ensure_future, coroutine, context=copy_context())

    def wait_for(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the loop, and wait for it."""
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def enter(self) -> None:
        """Count a user of the loop."""
        self._users += 1

    async def leave(self) -> None:
        """End what the last user leaves behind."""
        self._users -= 1
        if self._users:
            return
        left = asyncio.all_tasks() - {self._main, asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.gather(*left, return_exceptions=True)


_host = cache(_Host)


class _Lifespan:
    """The time between start-up and shutdown of an application."""

    async def start(self, app: Callable[..., Any], state: dict[str, Any]) -> None:
        _host().enter()
        self._asked: asyncio.Queue[Message] = asyncio.Queue()
        self._told: asyncio.Queue[Message] = asyncio.Queue()
        scope = {"type": "lifespan", "state": state}
        self._task = asyncio.ensure_future(app(scope, self._asked.get, self._told.put))
        await self._ask("startup")

    async def end(self) -> None:
        try:
            await self._ask("shutdown")
        finally:
            await _host().leave()

    async def _ask(self, event: str) -> None:
        await self._asked.put({"type": f"lifespan.{event}"})
        told = asyncio.ensure_future(self._told.get())
        await asyncio.wait([told, self._task], return_when=asyncio.FIRST_COMPLETED)
        if not told.done() or told.result()["type"] != f"lifespan.{event}.complete":
            told.cancel()
            await self._task
            raise AssertionError(f"the application failed at its {event}")


class _Transport(_TestClientTransport):
    """Passes HTTP requests to the application; websockets go the way of starlette."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.scheme not in _PORTS:
            return super().handle_request(request)
        exchange = _Exchange(self.app, self._scope(request), request)
        messages = exchange.messages()
        start = next(messages, None)
        if start is None:
            self._raise(exchange)
            assert not self.raise_server_exceptions, "The application sent no response."
            return httpx2.Response(500, request=request)
        abort = exchange.close
        self._open_requests.add(abort)

        def body() -> Iterator[bytes]:
            for message in messages:
                if message.get("body") and request.method != "HEAD":
                    yield bytes(message["body"])
            close()

        def close() -> None:
            exchange.close()
            self._open_requests.discard(abort)
            self._raise(exchange)

        headers = [(name.decode(), value.decode()) for name, value in start.get("headers", [])]
        return httpx2.Response(start["status"], headers=headers, stream=_Body(body(), close), request=request)

    def _raise(self, exchange: _Exchange) -> None:
        if self.raise_server_exceptions and exchange.error is not None:
            raise exchange.error

    def _scope(self, request: httpx2.Request) -> dict[str, Any]:
        url = request.url
        return {
            "type": "http",
            "http_version": "1.1",
            "method": request.method,
            "path": unquote(url.path),
            "raw_path": url.raw_path.split(b"?", 1)[0],
            "root_path": self.root_path,
            "scheme": url.scheme,
            "query_string": url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": self.client,
            "server": [url.host, url.port or _PORTS[url.scheme]],
            "extensions": {},
            "state": self.app_state.copy(),
        }


class _Body(httpx2.SyncByteStream):
    def __init__(self, chunks: Iterator[bytes], close: Callable[[], None]) -> None:
        self._chunks = chunks
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self._close()


class _Exchange:
    """One request, and what the application sends for it."""

    def __init__(self, app: Callable[..., Any], scope: dict[str, Any], request: httpx2.Request) -> None:
        self.error: BaseException | None = None
        self._app = app
        self._scope = scope
        self._request = request
        self._requested = False
        self._sent: list[Message] = []  # what the test has not been handed
        self._handed: SimpleQueue[tuple[list[Message], bool]] = SimpleQueue()
        self._ended = False  # as the test knows
        self._taken = asyncio.Event()
        self._complete = asyncio.Event()
        self._cancel: anyio.CancelScope | None = None
        _host().start(self._run())

    def messages(self) -> Iterator[Message]:
        """Yield what the application sends until it ends."""
        while not self._ended:
            messages, self._ended = self._handed.get()
            for message in messages:
                if message.get("more_body"):
                    _host().loop.call_soon_threadsafe(self._taken.set)
                yield message

    def close(self) -> None:
        """Cancel the application unless its response is complete, and wait until it ends."""
        if not self._ended:
            _host().loop.call_soon_threadsafe(self._cancel_if_incomplete)
        while not self._ended:
            self._ended = self._handed.get()[1]

    def _cancel_if_incomplete(self) -> None:
        if self._cancel is not None and not self._complete.is_set():
            self._cancel.cancel()

    async def _run(self) -> None:
        _host().enter()
        try:
            with anyio.CancelScope() as self._cancel:
                await self._app(self._scope, self._receive, self._send)
        except BaseException as error:
            self.error = error
        await _host().leave()
        self._hand_over(ends=True)

    async def _receive(self) -> Message:
        if self._requested:
            await self._complete.wait()
            return {"type": "http.disconnect"}
        self._requested = True
        return {"type": "http.request", "body": self._request.read()}

    async def _send(self, message: Message) -> None:
        self._sent.append(message)
        if message["type"] == "http.response.start":
            _host().loop.call_soon(self._hand_over)  # with the body, if that follows at once
        elif message.get("more_body"):
            self._hand_over()
            await self._taken.wait()
            self._taken.clear()
        else:
            self._complete.set()

    def _hand_over(self, *, ends: bool = False) -> None:
        if self._sent or ends:
            self._handed.put((self._sent, ends))
            self._sent = []
