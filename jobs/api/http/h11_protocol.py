"""uvicorn's H11Protocol with a header timeout and OpenAI-style error bodies.

uvicorn has no header timeout: clients that never finish their headers could use up all file descriptors. It also
closes a connection while request bytes still arrive, which resets it, and the client may lose the error response. So
after an error this protocol half-closes the connection and discards what still arrives.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jobs.openai.errors import error_body

HEADERS_TIMEOUT_S = 15.0  # for the complete headers of a request
LINGER_TIMEOUT_S = 2.0  # for the client to read an error response and close
_REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class ConflictingLengths(h11.RemoteProtocolError):
    """The headers give the length of the body twice."""


class StrictConnection(h11.Connection):
    """Rejects Content-Length together with Transfer-Encoding: proxies may disagree on them (request smuggling)."""

    def next_event(self) -> Any:
        """Return the next event; raise ConflictingLengths."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name.lower() for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise ConflictingLengths("Send Content-Length or Transfer-Encoding, not both.")
        return event


class TimeoutH11Protocol(H11Protocol):
    """One connection with a header timeout."""

    _timer: asyncio.TimerHandle | None = None
    _failed = False
    _upgraded = False  # to WebSocket

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        super().__init__(*arguments, **fields)
        self.conn = StrictConnection(h11.SERVER, self.conn._max_incomplete_event_size)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the header timeout."""
        super().connection_made(transport)
        self._start_timer(HEADERS_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes; keep the timeout running until headers are complete. Discard bytes after an error."""
        if not self._failed:
            super().data_received(data)
            self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_timer()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Stop the timeout and hand the connection over: a WebSocket may stay open for long."""
        self._upgraded = True
        self._stop_timer()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with 400 and headers that are too long with 431, then close."""
        error = sys.exc_info()[1]
        status = 431 if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431 else 400
        msg = str(error) if isinstance(error, ConflictingLengths) else msg
        reason = _REASONS[status]
        body = json.dumps(error_body(status, msg if status == 400 else "The request headers are too long.")).encode()
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
        self._failed = True
        self.transport.write_eof()
        if self.cycle is not None:  # wake a route that waits for the rest of this body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._stop_timer()
        self._start_timer(LINGER_TIMEOUT_S)

    def _update_timer(self) -> None:
        if self._failed or self._upgraded:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._start_timer(HEADERS_TIMEOUT_S)

    def _start_timer(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
