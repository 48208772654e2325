"""Redis behind TLS and a password: our clients speak through it, and refuse what nobody vouches for."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from jobs.errors import QueueUnavailable
from jobs.messages import PartialEvent, PromptBatch
from jobs.partials import Publisher, channel
from jobs.producer import push
from jobs.redis_server import answers

PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that vouches for itself, with its key in the same file."""
    if shutil.which("openssl") is None and not os.environ.get("CI"):
        pytest.skip("there is no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run(
        [*command.split(), "-keyout", path, "-out", path.with_suffix(".crt")], check=True, capture_output=True
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture
def tls_port(certificate: Path, redis_url: str) -> Iterator[int]:
    """A port of ours that takes TLS off and passes on to the real server, which wants a password."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    plain_port = int(redis_url.rpartition(":")[2].partition("/")[0])
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                raw, _ = listener.accept()
                threading.Thread(target=_pass_on, args=(context, raw, plain_port), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("requirepass", PASSWORD)
    yield listener.getsockname()[1]
    listener.close()
    with redis.Redis.from_url(redis_url, password=PASSWORD) as client:
        client.config_set("requirepass", "")
        client.delete("basic:basic.ingest")


def _pass_on(context: ssl.SSLContext, raw: socket.socket, port: int) -> None:
    with (
        suppress(OSError),
        raw,
        context.wrap_socket(raw, server_side=True) as inside,
        socket.create_connection(("127.0.0.1", port)) as outside,
    ):
        back = threading.Thread(target=_copy, args=(outside, inside), daemon=True)
        back.start()
        _copy(inside, outside)
        back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def test_batches_and_events_go_through_tls_with_a_password(tls_port: int, certificate: Path, redis_url: str) -> None:
    url = f"rediss://:{PASSWORD}@127.0.0.1:{tls_port}/0?ssl_ca_certs={certificate}"
    assert answers(url)
    with redis.Redis.from_url(redis_url, password=PASSWORD) as plain, plain.pubsub() as subscription:
        subscription.subscribe(channel("job"))
        assert subscription.get_message(timeout=5) is not None

        push(PromptBatch(id="a", requests=("Hello",)), url)
        assert plain.llen("basic:basic.ingest") == 1

        publisher = Publisher(url)
        publisher.publish([PartialEvent(job_id="job", type="job")])
        assert subscription.get_message(timeout=10) is not None
        publisher.close()


def test_a_certificate_that_nobody_vouches_for_is_refused(tls_port: int, redis_url: str) -> None:
    url = f"rediss://:{PASSWORD}@127.0.0.1:{tls_port}/0"

    assert not answers(url)
    with pytest.raises(QueueUnavailable) as refused:
        push(PromptBatch(id="a", requests=("Hello",)), url)

    assert PASSWORD not in str(refused.value)
    with redis.Redis.from_url(redis_url, password=PASSWORD) as plain:
        assert plain.llen("basic:basic.ingest") == 0
