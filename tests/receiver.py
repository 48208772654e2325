"""An HTTP server in threads of this process that receives webhooks, and answers them as a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


class Receiver:
    """What has arrived, as pairs of headers and body, and the URL to send to."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.answer: Answer = status(200)
        self._arrived = threading.Condition()

    def take(self, headers: dict[str, str], body: bytes) -> None:
        """Keep a request."""
        with self._arrived:
            self.received.append((headers, body))
            self._arrived.notify_all()

    def wait_for(self, count: int, timeout_s: float = 300.0) -> list[tuple[dict[str, str], bytes]]:
        """Wait until this number of requests has arrived, and return them; the timeout only ends what hangs."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.received) >= count, timeout_s), self.received
            return list(self.received)


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    """Answer with a status and a body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@contextmanager
def a_receiver() -> Iterator[Receiver]:
    """Run a receiver on a free port of this machine inside the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.take({name.lower(): value for name, value in self.headers.items()}, body)
            receiver.answer(self)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError, ValueError):  # the sender has died or given up
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}/hook")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
