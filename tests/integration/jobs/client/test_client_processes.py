"""The client in scripts of its own: one that ends without closing it, and one that forks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.unit.jobs.client.test_client import tokens


def served(answers: Iterable[bytes]) -> tuple[str, socket.socket]:
    """Answer one call on a socket with these parts of a body that does not end; return URL and socket."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in answers:
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        connection.recv(1)  # until the client goes
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", listener


@pytest.mark.parametrize("stream", ["outputs", "follow"])
def test_a_script_that_reads_part_of_a_stream_and_forgets_to_close_still_ends(stream: str) -> None:
    line = json.dumps({"custom_id": "a", "index": 0, "status": "completed"})
    event = tokens(0, "Hel").model_dump_json()
    url, listener = served([f"{line}\n".encode() if stream == "outputs" else f"data: {event}\n\n".encode()])
    script = f"from jobs import Client\nitems = Client('{url}').job('batch_1').{stream}()\nprint(next(items).index)"
    with listener:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_forked_process_opens_its_own_connections() -> None:
    addresses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            addresses.append(self.client_address[1])
            self.send_response(200)
            self.send_header("content-length", "12")
            self.end_headers()
            self.wfile.write(b'{"data": []}')

        def log_message(self, *_: object) -> None:
            pass

    script = """if True:
        import os, sys
        from jobs import Client
        client = Client(sys.argv[1])
        client.jobs()
        if child := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        client.jobs()
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, "-c", script, f"http://127.0.0.1:{server.server_port}"]
        subprocess.run(command, timeout=240, check=True)
        server.shutdown()
    parent, child, parent_again = addresses
    assert child not in (parent, parent_again)  # the parent keeps its own, unless it was idle for five seconds


def test_a_script_that_forgets_to_close_its_client_still_ends() -> None:
    script = "from jobs.client import Client\nClient('http://127.0.0.1:9', patience_s=0).jobs()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "does not answer" in done.stderr
