"""uvicorn's HTTP/1.1 with an end to its patience, and errors in our envelope where it answers before any route.

uvicorn lets a connection be that never finishes its headers; enough of them would take every file descriptor there is.
And it closes a connection on which bytes are still coming, which resets it: whoever sent them would not see the answer.
So after an answer of ours we say that nothing follows, and pass over what still comes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jobs.openai.errors import error_body

HEADERS_TIMEOUT_S = 15.0  # within which a connection must have brought a whole head of a request
LINGER_TIMEOUT_S = 2.0  # within which a sender that is refused must have read the answer and closed
_REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class ConflictingLengths(h11.RemoteProtocolError):
    """The head of a request says twice how long its body is."""


class StrictConnection(h11.Connection):
    """Refuses a head with two lengths of its body: of the servers on the way, each may believe another."""

    def next_event(self) -> Any:
        """Return the next event; raise RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name.lower() for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise ConflictingLengths("Send Content-Length or Transfer-Encoding, not both.")
        return event


class TimeoutH11Protocol(H11Protocol):
    """One connection."""

    _closing: asyncio.TimerHandle | None = None
    _refused = False
    _handed_over = False  # to the protocol of WebSockets

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        """Read requests strictly."""
        super().__init__(*arguments, **fields)
        self.conn = StrictConnection(h11.SERVER, self.conn._max_incomplete_event_size)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait(HEADERS_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Go on waiting where the bytes do not complete the head of a request."""
        if not self._refused:
            super().data_received(data)
            self._wait_or_not()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over. It is a socket's from here on, and may last: no timer of ours may close it."""
        self._handed_over = True
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has a head that is too long, and close."""
        error = sys.exc_info()[1]
        status = 431 if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431 else 400
        msg = str(error) if isinstance(error, ConflictingLengths) else msg
        reason = _REASONS[status]
        body = json.dumps(error_body(status, msg if status == 400 else "The head of the request is too long.")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events: tuple[Any, ...] = (
            h11.Response(status_code=status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        self.transport.write_eof()
        if self.cycle is not None:  # a route that waits for the rest of this body waits for nothing
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._stop_waiting()
        self._wait(LINGER_TIMEOUT_S)

    def _wait_or_not(self) -> None:
        if self._refused or self._handed_over:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._closing is None:
            self._wait(HEADERS_TIMEOUT_S)

    def _wait(self, seconds: float) -> None:
        self._closing = asyncio.get_running_loop().call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
