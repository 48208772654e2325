"""A real API server under abuse: its memory stays bounded, and other clients are served meanwhile. No worker runs."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.api.http import h11_protocol
from jobs.submission.items import MAX_JSON_NODES
from storage import schema

MAX_MB = 600
JSON = {"content-type": "application/json"}
LINES = {"content-type": "application/x-ndjson"}
STREAMS = 40


class ApiServer:
    """A running API server: its URL and process id."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self.pid = pid
        host, _, port = url.removeprefix("http://").partition(":")
        self.address = (host, int(port))

    def peak_mb(self) -> float:
        """Return its peak resident memory in MB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1000

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(data)
        return connection

    def answer(self, data: bytes) -> tuple[int, Any]:
        """Send raw bytes; return status and body of the response."""
        with self.raw(data) as connection:
            received = b""
            while part := connection.recv(65_536):
                received += part
        head, _, body = received.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[ApiServer]:
    data_dir = tmp_path_factory.mktemp("server")
    schema.upgrade(f"sqlite:///{data_dir / 'basic.sqlite3'}")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BASIC_")}
    own = {
        "BASIC_DATA_DIR": str(data_dir),
        "BASIC_API_PORT": "0",
        "BASIC_REDIS_URL": redis_url,
        "BASIC_MAX_STREAMS": str(STREAMS),
    }
    ready = data_dir / "ready"
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.api", "--ready-file", str(ready)], env=inherited | own, stderr=subprocess.DEVNULL
    )
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    yield ApiServer(ready.read_text().strip(), process.pid)
    process.terminate()
    assert process.wait(120) == 0


@contextmanager
def others_are_served(server: ApiServer) -> Iterator[None]:
    """Submit and read jobs inside the block, as an ordinary client does: one that is told to come back does."""
    over = threading.Event()
    served: list[int] = []
    refused: list[str] = []

    def go_on() -> None:
        with httpx.Client(base_url=server.url, timeout=240) as http:
            while not over.is_set() or not served:
                job = http.post("/v1/jobs", json={"requests": ["Hello"], "max_tokens": 5})
                if job.status_code == 200:
                    served.append(http.get(f"/v1/jobs/{job.json()['id']}").status_code)
                else:
                    refused.append(job.json()["error"]["code"])

    other = threading.Thread(target=go_on)
    other.start()
    try:
        yield
    finally:
        over.set()
        other.join()
    assert set(served) == {200}
    assert set(refused) <= {"database_unavailable"}, "a slow machine writes a large body for longer than calls wait"


def bodies(size: int) -> dict[str, tuple[dict[str, str], Iterator[bytes]]]:
    """Return bodies that take much more memory than their size if parsed naively."""
    piece, lists = b"x" * 65_536, b"[]," * 20_000
    line = b'{"prompt": [' + b"[]," * 3_000_000 + b"[]]}\n"  # just below the limit of a line
    dear = b'{"prompt": [' + b'{"a":0},' * (MAX_JSON_NODES - 10) + b"0]}\n"  # and of lists and objects

    packed = {"content-encoding": "gzip"}

    def wide(chars: int) -> bytes:
        prompt = "x" * chars + "\U0001f600"  # in memory each character takes four bytes
        return (json.dumps({"prompt": prompt, "max_tokens": 1}, ensure_ascii=False) + "\n").encode()

    def pieces(begin: bytes, part: bytes) -> Iterator[bytes]:
        yield begin
        for _ in range(size // len(part)):
            yield part

    return {
        "one endless line": (LINES, pieces(b'"', piece)),
        "one endless string": (JSON, pieces(b'{"requests": ["', piece)),
        "endless lists": (JSON, pieces(b'{"requests": [', lists)),
        "lines of lists": (LINES, pieces(b"", line)),
        "lines of objects": (LINES, pieces(b"", dear)),
        "lines of wide text": (LINES, pieces(b"", wide(3_000) * 20)),
        "lines of long wide text": (LINES, pieces(b"", wide(999_999))),
        "damaged gzip": (JSON | packed, pieces(b"\x1f\x8b", piece)),
        "a gzip bomb": (LINES | packed, (gzip.compress(bytes(3 * size)) for _ in range(1))),
    }


@pytest.mark.parametrize("kind", bodies(0))
def test_a_hostile_body_takes_bounded_memory(server: ApiServer, kind: str) -> None:
    def send(found: list[int]) -> None:
        headers, body = bodies(100_000_000)[kind]
        try:
            found.append(httpx.post(f"{server.url}/v1/jobs", content=body, headers=headers, timeout=240).status_code)
        except (httpx.WriteError, httpx.ReadError):  # the server closed the connection while we were sending
            found.append(413)

    with others_are_served(server):
        found: list[int] = []
        senders = [threading.Thread(target=send, args=(found,)) for _ in range(2)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
    assert set(found) <= {200, 400, 413, 415}, found
    assert server.peak_mb() < MAX_MB


def test_a_body_of_the_maximum_size_is_accepted_in_bounded_memory(server: ApiServer) -> None:
    text = "Word " * 760
    line = (json.dumps({"prompt": text, "max_tokens": 1}) + "\n").encode()
    lines = (line * 100 for _ in range(500))
    with others_are_served(server):
        reply = httpx.post(f"{server.url}/v1/jobs", content=lines, headers=LINES, timeout=240)
    assert reply.status_code == 200, reply.text
    assert reply.json()["request_counts"]["total"] == 50_000
    assert server.peak_mb() < MAX_MB


def test_a_body_that_does_not_arrive_delays_no_other_client(server: ApiServer) -> None:
    head = (
        b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    )
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(server.raw(head))
            stack.enter_context(server.raw(b"GET /v1/jobs HTTP/1.1\r\nhos"))
        with others_are_served(server):
            pass
    assert server.peak_mb() < MAX_MB


def test_streams_beyond_the_limit_are_refused_and_a_closed_one_frees_its_slot(server: ApiServer) -> None:
    job = httpx.post(f"{server.url}/v1/jobs", json={"requests": ["Hello"]}, timeout=240).json()["id"]
    request = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()

    def status(connection: socket.socket) -> bytes:
        return connection.recv(12)[9:]

    with ExitStack() as stack, others_are_served(server):
        streams = [stack.enter_context(server.raw(request)) for _ in range(STREAMS)]
        assert {status(stream) for stream in streams} == {b"200"}
        with httpx.stream("GET", f"{server.url}/v1/jobs/{job}/events", timeout=240) as one_more:
            assert one_more.status_code == 429
            assert int(one_more.headers["retry-after"]) > 0
        streams.pop().close()
        deadline = time.monotonic() + 60
        while status(last := stack.enter_context(server.raw(request))) != b"200":
            last.close()
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /v1/jobs HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", 431),
        (b"GET /v1/jobs?" + b"a=1&" * 50_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431),
        (b"no HTTP at all\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", 400),
        (b"GET /v1/jobs HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n", 400),
        (
            b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nno length\r\n"
            + b"z" * 200_000,
            400,
        ),
        (
            b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
            b"0\r\n\r\n",
            400,
        ),
    ],
)
def test_malformed_http_gets_the_error_object(server: ApiServer, request_: bytes, status: int) -> None:
    found, body = server.answer(request_)
    assert found == status
    assert body["error"].keys() == {"message", "type", "param", "code"}


@contextmanager
def served_with_patience(app: Any) -> Iterator[tuple[str, int]]:
    """Serve an application behind `TimeoutH11Protocol`; yield its address."""
    import uvicorn

    config = uvicorn.Config(app, http=h11_protocol.TimeoutH11Protocol, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def test_a_client_that_does_not_finish_its_headers_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    monkeypatch.setattr(h11_protocol, "HEADERS_TIMEOUT_S", 0.2)
    with served_with_patience(app) as address:
        request = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
        for data in (b"", b"GET / HTT", request + request[:9]):
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(data)
                received = b""
                while part := connection.recv(1_000):
                    received += part
                assert received.startswith(b"HTTP/1.1 204" if data.startswith(request) else b"")


@pytest.mark.parametrize("parts", [1, 2], ids=["at once", "in two parts"])
def test_a_websocket_outlives_the_header_timeout(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """A message that it sends after the timeout still arrives."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await send({"type": "websocket.accept"})
        await asyncio.sleep(2 * h11_protocol.HEADERS_TIMEOUT_S)
        await send({"type": "websocket.send", "text": "still here"})
        await send({"type": "websocket.close"})

    monkeypatch.setattr(h11_protocol, "HEADERS_TIMEOUT_S", 1.0)  # within which even a busy machine sends two parts
    hello = (
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with served_with_patience(app) as address, socket.create_connection(address, timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if parts == 2:
            connection.sendall(hello[:40])
            hello = hello[40:]
        connection.sendall(hello)
        received = b""
        while b"still here" not in received:
            part = connection.recv(1_000)
            assert part, "the connection was closed"
            received += part
        assert received.startswith(b"HTTP/1.1 101")
