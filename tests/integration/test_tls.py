"""Redis and PostgreSQL behind TLS: our clients connect, and refuse untrusted certificates."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from fastapi.testclient import TestClient
from sqlalchemy import URL, make_url, text

from jobs.api.app import make_api
from jobs.errors import QueueUnavailable
from jobs.local.redis_server import is_ready
from jobs.messages import PartialEvent, PromptBatch
from jobs.producer import push
from jobs.settings import JobsSettings
from jobs.streaming.pubsub import Publisher, channel
from storage import schema
from storage.session import DATABASE_UNAVAILABLE, Database
from tests.databases import drop_schema

PASSWORD = "hunter2"


def self_signed(directory: Path) -> Path:
    """Return a self-signed certificate for 127.0.0.1, with its key in the same file."""
    if shutil.which("openssl") is None and not os.environ.get("CI"):
        pytest.skip("there is no openssl to make a certificate with")
    path = directory / "server.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run(
        [*command.split(), "-keyout", path, "-out", path.with_suffix(".crt")], check=True, capture_output=True
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of the servers."""
    return self_signed(tmp_path_factory.mktemp("tls"))


@contextmanager
def tls_in_front_of(
    port: int, certificate: Path, greet: Callable[[socket.socket], None] = lambda raw: None
) -> Iterator[int]:
    """Terminate TLS in front of a server; yield the port. `greet` does what the protocol needs before TLS begins."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    raw, _ = listener.accept()
                    threading.Thread(target=_pass_on, args=(context, raw, greet, port), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def _pass_on(context: ssl.SSLContext, raw: socket.socket, greet: Callable[[socket.socket], None], port: int) -> None:
    with suppress(OSError), raw:
        greet(raw)
        with (
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


@pytest.fixture
def tls_port(certificate: Path, redis_url: str) -> Iterator[int]:
    """A TLS port in front of a real Redis-protocol server with a password."""
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("requirepass", PASSWORD)
    with tls_in_front_of(int(redis_url.rpartition(":")[2].partition("/")[0]), certificate) as port:
        yield port
    with redis.Redis.from_url(redis_url, password=PASSWORD) as client:
        client.config_set("requirepass", "")
        client.delete("basic:basic.ingest")


def test_batches_and_events_go_through_tls_with_a_password(tls_port: int, certificate: Path, redis_url: str) -> None:
    url = f"rediss://:{PASSWORD}@127.0.0.1:{tls_port}/0?ssl_ca_certs={certificate}"
    assert is_ready(url)
    with redis.Redis.from_url(redis_url, password=PASSWORD) as plain, plain.pubsub() as subscription:
        subscription.subscribe(channel("job"))
        assert subscription.get_message(timeout=60) is not None

        push(PromptBatch(id="a", requests=("Hello",)), url)
        assert plain.llen("basic:basic.ingest") == 1

        publisher = Publisher(url)
        publisher.publish([PartialEvent(job_id="job", type="job")])
        assert subscription.get_message(timeout=60) is not None
        publisher.close()


def test_an_untrusted_certificate_is_refused(tls_port: int, redis_url: str) -> None:
    url = f"rediss://:{PASSWORD}@127.0.0.1:{tls_port}/0"

    assert not is_ready(url)
    with pytest.raises(QueueUnavailable) as refused:
        push(PromptBatch(id="a", requests=("Hello",)), url)

    assert PASSWORD not in str(refused.value)
    with redis.Redis.from_url(redis_url, password=PASSWORD) as plain:
        assert plain.llen("basic:basic.ingest") == 0


def agree_on_tls(raw: socket.socket) -> None:
    """Answer as PostgreSQL does when a client asks for TLS; one that does not ask is not served."""
    if raw.recv(8, socket.MSG_WAITALL) != b"\0\0\0\x08\x04\xd2\x16\x2f":
        raise ConnectionAbortedError
    raw.sendall(b"S")


@pytest.fixture
def tls_database(certificate: Path, postgresql_url: str) -> Iterator[URL]:
    """The empty test database behind a port that accepts TLS only, which the wheel's server can't do."""
    drop_schema(postgresql_url)
    url = make_url(postgresql_url)
    assert url.port is not None
    with tls_in_front_of(url.port, certificate, agree_on_tls) as port:
        yield url.set(port=port)
    drop_schema(postgresql_url)


def verified(url: URL, certificate: Path) -> str:
    """Return the URL with certificate verification."""
    wanted = {"sslmode": "verify-full", "sslrootcert": str(certificate)}
    return url.update_query_dict(wanted).render_as_string(hide_password=False)


def test_without_tls_the_database_is_not_reached(tls_database: URL) -> None:
    database = Database.open(tls_database.update_query_dict({"sslmode": "disable"}).render_as_string())
    with pytest.raises(DATABASE_UNAVAILABLE), database.read() as session:
        session.execute(text("SELECT 1"))
    database.dispose()


def test_the_database_is_created_and_read_through_tls(tls_database: URL, certificate: Path, tmp_path: Path) -> None:
    url = verified(tls_database, certificate)
    schema.upgrade(url)
    database = Database.open(url)
    settings = JobsSettings(data_dir=tmp_path, target="tiny", database_url=url)
    with TestClient(make_api(settings, database, lambda job_id, model: None)) as api:
        job = api.post("/v1/jobs", json={"requests": ["Hello"]}).json()
        assert api.get(f"/v1/jobs/{job['id']}").json()["id"] == job["id"]
    database.dispose()


@pytest.mark.parametrize("why", ["nobody vouches for it", "it is another server's"])
def test_a_database_with_an_untrusted_certificate_is_refused(
    tls_database: URL, certificate: Path, tmp_path: Path, why: str
) -> None:
    if why == "nobody vouches for it":
        certificate = self_signed(tmp_path)
    else:
        tls_database = tls_database.set(host="db.example").update_query_dict({"hostaddr": "127.0.0.1"})
    database = Database.open(verified(tls_database, certificate))
    with pytest.raises(DATABASE_UNAVAILABLE, match="certificate"), database.read() as session:
        session.execute(text("SELECT 1"))
    database.dispose()
