"""Limits of bodies that anyone may send to the dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from jobs.dashboard.body_limit import FORM_BYTES, SOCKET_BYTES, DashboardBodyLimit

LOGIN = "/dashboard/login"
SOCKET = "/dashboard/_nicegui_ws/socket.io/"


class Call:
    """A call through `DashboardBodyLimit` with an endless body in parts."""

    def __init__(
        self, path: str, parts: Iterable[bytes], declared: int | None = None, *, timeout_s: float = 30
    ) -> None:
        waiting = list(parts)
        self.status = 0
        self.body = bytearray()  # that the application received
        self.reads = 0  # parts that were read

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            more = True
            while more:
                message = await receive()
                self.body += message["body"]
                more = message["more_body"]
            await send({"type": "http.response.start", "status": 204, "headers": []})

        async def receive() -> Message:
            self.reads += 1
            if not waiting:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

        async def send(message: Message) -> None:
            self.status = message.get("status", self.status)

        headers = [] if declared is None else [(b"content-length", str(declared).encode())]
        scope: dict[str, Any] = {"type": "http", "path": path, "headers": headers, "method": "POST"}
        asyncio.run(DashboardBodyLimit(app, timeout_s)(scope, receive, send))


@pytest.mark.parametrize(
    ("path", "most"),
    [
        (LOGIN, FORM_BYTES),
        ("/dashboard/logout", FORM_BYTES),
        ("/dashboard/", FORM_BYTES),
        ("/dashboard", FORM_BYTES),
        ("/dashboard/_nicegui/3/anything", FORM_BYTES),
        (SOCKET, SOCKET_BYTES),
    ],
)
def test_a_long_body_reaches_no_route_of_the_dashboard(path: str, most: int) -> None:
    assert Call(path, [b"x" * most]).status == 204
    long = Call(path, [b"x" * most, b"x"])
    assert (long.status, bytes(long.body)) == (413, b"")
    declared = Call(path, [], declared=most + 1)
    assert (declared.status, declared.reads) == (413, 0), "refused before anything is read"


def test_a_short_body_reaches_the_route_whole_however_it_is_split() -> None:
    assert Call(LOGIN, [b"ke", b"", b"y=sk"]).body == b"key=sk"


def test_a_body_that_does_not_arrive_times_out() -> None:
    unfinished = Call(LOGIN, [], timeout_s=0.01)
    assert (unfinished.status, bytes(unfinished.body)) == (408, b"")


def test_other_routes_have_limits_of_their_own() -> None:
    assert len(Call("/v1/files", [b"x" * SOCKET_BYTES, b"x"]).body) == SOCKET_BYTES + 1
    assert len(Call("/dashboards", [b"x" * FORM_BYTES, b"x"]).body) == FORM_BYTES + 1
