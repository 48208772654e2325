"""What the API server answers while a part is down, busy or full: status, cause and Retry-After."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, text
from sqlalchemy.pool import QueuePool

from jobs.api.app import make_api
from jobs.keys import Scope
from jobs.messages import CHAT_ENDPOINT
from jobs.settings import JobsSettings
from storage import queries
from storage.models import Base
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason, write_connection
from storage.writes import insert_job
from tests.conftest import free_port, start_redis, stop
from tests.databases import on_postgresql, on_sqlite
from tests.factories import a_job, a_key, a_request
from tests.postgres import QUICK, Postgres
from tests.unit.jobs.api.test_routes import answer_all
from tests.unit.storage.acts import record

A_JOB = {"requests": ["Hello"], "max_tokens": 10}
A_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
WAITS_S = 90.0  # of a process that waits for a Redis server that hangs, by `patient`, or for a writer of SQLite
QUICK_S = WAITS_S / 2  # even a busy machine answers sooner, unless it waits for that server
HANGS_S = 60.0  # for three calls, each of which times out within 5 s on a quiet machine


@contextmanager
def serve(database: Database, directory: Path, redis_url: str = "") -> Iterator[TestClient]:
    """Serve the real application on a database; without `redis_url` it notifies no worker."""
    settings = JobsSettings(
        data_dir=directory, target="tiny", redis_url=redis_url or f"redis://127.0.0.1:{free_port()}/0"
    )
    with TestClient(make_api(settings, database), raise_server_exceptions=False) as client:
        yield client


def refused(reply: Any, status: int, code: str) -> str:
    """Return the message of an error that names the cause and has a Retry-After header."""
    assert reply.status_code == status, reply.text
    assert int(reply.headers["retry-after"]) > 0
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", code)
    return str(error["message"])


def ask(api: TestClient) -> list[Any]:
    return [api.get("/v1/jobs"), api.post("/v1/jobs", json=A_JOB), api.get("/v1/files")]


def test_a_database_that_stops_is_a_503_until_it_is_back(tmp_path: Path) -> None:
    server = Postgres()  # it is killed, so its commits must be durable
    server.start()
    try:
        with on_postgresql(server.create("pressure")) as database, serve(database, tmp_path) as api:
            assert {reply.status_code for reply in ask(api)} == {200}
            server.stop(signal.SIGQUIT)
            for reply in [*ask(api), api.get("/readyz")]:
                assert "database does not answer" in refused(reply, 503, "database_unavailable")
            assert api.get("/healthz").status_code == 200
            server.start()
            assert {reply.status_code for reply in ask(api)} == {200}
    finally:
        server.remove()


def test_a_database_that_another_process_locks_for_too_long_is_a_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.session._BUSY_TIMEOUT_S", 0.1)
    with on_sqlite(tmp_path) as database, serve(database, tmp_path) as api:
        with write_connection(database.engine):
            refused(api.post("/v1/jobs", json=A_JOB), 503, "database_unavailable")
            assert api.get("/v1/jobs").json()["data"] == [], "reads are not delayed, and nothing was stored"
        assert api.post("/v1/jobs", json=A_JOB).status_code == 200


async def wait_for_writers(database: Database, directory: Path) -> tuple[list[int], int, list[int]]:
    """Send many writes while another transaction holds the write lock.

    Return the statuses of the reads meanwhile, the number of writes that had ended by then, and the statuses of the
    writes in the end.
    """
    settings = JobsSettings(data_dir=directory, target="tiny", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    transport = httpx.ASGITransport(make_api(settings, database))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=None) as client:
        known = (await client.post("/v1/jobs", json=A_JOB)).json()["id"]
        with write_connection(database.engine):
            posts = [asyncio.create_task(client.post("/v1/jobs", json=A_JOB)) for _ in range(40)]
            posts += [asyncio.create_task(client.post(f"/v1/jobs/{known}/cancel")) for _ in range(40)]
            posts += [asyncio.create_task(client.delete("/v1/files/none")) for _ in range(40)]
            await asyncio.sleep(0.2)
            paths = [f"/v1/jobs/{known}", "/v1/jobs", "/v1/models", "/v1/files", "/readyz", f"/v1/jobs/{known}/outputs"]
            read = [(await client.get(path)).status_code for path in paths]
            ended = sum(post.done() for post in posts)
        return read, ended, [reply.status_code for reply in await asyncio.gather(*posts)]


def test_readers_do_not_wait_behind_writers_that_wait_for_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.session._BUSY_TIMEOUT_S", WAITS_S)
    with on_sqlite(tmp_path) as database:
        read, ended, written = asyncio.run(wait_for_writers(database, tmp_path))

    assert read == [200] * 6
    assert ended == 0, "the readers were answered while all writers waited"
    assert written == [200] * 80 + [404] * 40


def test_a_database_that_hangs_is_a_503_and_serves_again_when_it_wakes(tmp_path: Path) -> None:
    server = Postgres(**QUICK)
    server.start()
    try:
        with on_postgresql(server.create("pressure")) as database, serve(database, tmp_path) as api:
            api.headers.update(a_key(database, Scope.ADMIN))
            assert {reply.status_code for reply in ask(api)} == {200}
            with server.hanging():
                began_at = time.monotonic()
                for reply in ask(api):
                    assert "database does not answer" in refused(reply, 503, "database_unavailable")
                assert time.monotonic() - began_at < HANGS_S
            assert {reply.status_code for reply in ask(api)} == {200}
    finally:
        server.remove()


def write_while_it_hangs(database: Database, server: Postgres) -> None:
    with ExitStack() as hang, database.write() as session:
        insert_job(session, a_job(), [a_request()])
        hang.enter_context(server.hanging())
        session.execute(text("SELECT 1"))


def test_an_open_transaction_is_given_up_when_the_database_hangs() -> None:
    server = Postgres(**QUICK)
    server.start()
    try:
        with on_postgresql(server.create("pressure")) as database:
            with pytest.raises(DATABASE_UNAVAILABLE) as given_up:
                write_while_it_hangs(database, server)
            assert "did not answer within" in unavailable_reason(given_up.value)
            with database.read() as session:
                assert queries.jobs(session, 5).jobs == ()
    finally:
        server.remove()


def with_a_job(database: Database) -> str:
    answer_all(database)  # no request yet: this only registers a worker
    return record(database).job_id


def read_only_sqlite(directory: Path) -> Iterator[tuple[Database, str]]:
    with on_sqlite(directory) as database:
        known = with_a_job(database)
    database = Database.open(f"sqlite:///file:{directory / 'basic.sqlite3'}?mode=ro&uri=true")
    yield database, known
    database.dispose()


def read_only_postgresql(url: str) -> Iterator[tuple[Database, str]]:
    with on_postgresql(url) as database:
        known = with_a_job(database)
    database = Database.open(f"{url}?options=-cdefault_transaction_read_only%3Don")
    yield database, known
    database.dispose()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_read_only_database_is_served_and_submissions_say_that_it_is_read_only(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgresql_url") if kind == "postgresql" else ""
    opened = read_only_postgresql(url) if url else read_only_sqlite(tmp_path)
    for database, known in opened:
        with serve(database, tmp_path) as api:
            for path in (f"/v1/jobs/{known}", "/v1/jobs", f"/v1/jobs/{known}/outputs", "/v1/files", "/v1/models"):
                assert api.get(path).status_code == 200, path
            for reply in (
                api.post("/v1/jobs", json=A_JOB),
                api.post(f"/v1/jobs/{known}/cancel"),
                api.post(CHAT_ENDPOINT, json=A_CHAT),
                api.post("/v1/files", files={"file": ("lines.jsonl", b"{}")}, data={"purpose": "batch"}),
                api.delete("/v1/files/none"),
            ):
                assert "is read-only" in refused(reply, 503, "database_unavailable")


@pytest.mark.parametrize("with_key", [False, True])
def test_an_api_server_without_a_free_connection_answers_503(tmp_path: Path, with_key: bool) -> None:
    """Authentication is the first to need a connection, with a key and without."""
    pool = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    database = Database(create_engine(f"sqlite:///{tmp_path / 'basic.sqlite3'}", **pool))
    Base.metadata.create_all(database.engine)
    key = a_key(database) if with_key else {}
    with serve(database, tmp_path) as api:
        with database.engine.connect():
            refused(api.get("/v1/jobs", headers=key), 503, "database_unavailable")
        assert api.get("/v1/jobs", headers=key).status_code == 200
    database.dispose()


def fill_sqlite(database: Database) -> Callable[[], None]:
    """Limit the file to its present pages, as on a full disk; return a function that lifts the limit."""
    database.engine.dispose()
    with write_connection(database.engine) as connection:
        pages = connection.scalar(text("PRAGMA page_count"))
        connection.execute(text(f"PRAGMA max_page_count = {pages}"))

    def empty() -> None:
        with write_connection(database.engine) as connection:
            connection.execute(text("PRAGMA max_page_count = 1000000"))

    return empty


def test_a_full_disk_is_a_507_until_there_is_space_and_jobs_stay_readable(tmp_path: Path) -> None:
    one = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}  # the limit of pages belongs to a connection
    database = Database(create_engine(f"sqlite:///{tmp_path / 'basic.sqlite3'}", **one))
    Base.metadata.create_all(database.engine)
    with serve(database, tmp_path) as api:
        known = api.post("/v1/jobs", json=A_JOB).json()["id"]
        empty = fill_sqlite(database)
        large = {"requests": ["Hello " * 20_000]}
        assert "disk" in refused(api.post("/v1/jobs", json=large), 507, "storage_full")
        assert [job["id"] for job in api.get("/v1/jobs").json()["data"]] == [known]
        empty()
        assert api.post("/v1/jobs", json=large).status_code == 200
    database.dispose()


def test_a_full_disk_of_postgresql_is_a_507_too(tmp_path: Path, postgresql_url: str) -> None:
    """The error is injected, because filling a disk needs a disk for the test alone."""
    full = (
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$",
        "CREATE TRIGGER full_disk BEFORE INSERT ON jobs EXECUTE FUNCTION full_disk()",
    )
    with on_postgresql(postgresql_url) as database, serve(database, tmp_path) as api:
        with write_connection(database.engine) as connection:
            for statement in full:
                connection.execute(text(statement))
        try:
            assert "disk" in refused(api.post("/v1/jobs", json=A_JOB), 507, "storage_full")
            assert api.get("/v1/jobs").json()["data"] == []
        finally:
            with write_connection(database.engine) as connection:
                connection.execute(text("DROP FUNCTION full_disk CASCADE"))
        assert api.post("/v1/jobs", json=A_JOB).status_code == 200


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each wait for Redis last so long that a test which waits for one fails, on a machine of any speed."""
    names = ("producer._TIMEOUT_S", "streaming.hub._POLL_S")
    for name in (*names, *(f"streaming.pubsub.{each}" for each in ("_TIMEOUT_S", "_SUBSCRIBE_S", "_POLL_S"))):
        monkeypatch.setattr(f"jobs.{name}", WAITS_S)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("hangs", [False, True])
def test_without_a_redis_server_jobs_are_accepted_and_the_service_reports_it(tmp_path: Path, hangs: bool) -> None:
    """No submission depends on Redis: workers find the job in the database."""
    port = free_port()
    server = start_redis(port, tmp_path)
    with on_sqlite(tmp_path) as database, serve(database, tmp_path, f"redis://127.0.0.1:{port}/0") as api:
        assert api.get("/readyz").json()["redis"] == "ok"
        os.kill(server.pid, signal.SIGSTOP if hangs else signal.SIGKILL)
        began_at = time.monotonic()
        assert {reply.status_code for reply in ask(api)} == {200}
        assert time.monotonic() - began_at < QUICK_S
        assert api.get("/readyz").json()["redis"] == "degraded"
        os.kill(server.pid, signal.SIGCONT)
    stop(server)


@pytest.mark.usefixtures("patient")
def test_with_a_redis_server_that_hangs_an_interactive_request_is_answered(
    tmp_path: Path,
) -> None:
    port = free_port()
    server = start_redis(port, tmp_path)
    with on_sqlite(tmp_path) as database, serve(database, tmp_path, f"redis://127.0.0.1:{port}/0") as api:
        answer_all(database)  # no request yet: this only registers a worker
        os.kill(server.pid, signal.SIGSTOP)
        asked_at = time.monotonic()
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(api.post, CHAT_ENDPOINT, json=A_CHAT)
            while not (waiting := api.get("/v1/jobs?interactive=true").json()["data"]):
                time.sleep(0.01)
            recorded_after_s = time.monotonic() - asked_at
            answer_all(database)
            answered_at = time.monotonic()
            assert asked.result().json()["choices"][0]["message"]["content"] == "Paris."
        assert len(waiting) == 1
        assert recorded_after_s < QUICK_S
        assert time.monotonic() - answered_at < QUICK_S
        os.kill(server.pid, signal.SIGCONT)
    stop(server)
