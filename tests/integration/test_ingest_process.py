"""A real ingest process is killed during a batch: the next one completes the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import text

from jobs.messages import CHAT_ENDPOINT, PromptBatch
from jobs.producer import push
from jobs.settings import JobsSettings
from jobs.submission.batches import BatchSubmission, create_batch
from storage import files, schema, writes
from storage.session import Database
from tests.ports import free_port

LINES = 20_000
BAD = range(0, LINES, 2_000)  # lines whose content is refused
PATIENCE_S = 120.0


@pytest.fixture
def settings(tmp_path: Path, redis_url: str) -> Iterator[JobsSettings]:
    made = JobsSettings(data_dir=tmp_path, redis_url=redis_url, target="tiny")
    schema.upgrade(made.resolved_database_url)
    yield made
    with redis.Redis.from_url(redis_url) as server:
        server.flushall()  # a batch that no process has acknowledged would be delivered to those of other tests


@pytest.fixture
def database(settings: JobsSettings) -> Iterator[Database]:
    database = Database.open(settings.resolved_database_url)
    yield database
    database.dispose()


@contextmanager
def an_ingest_process(settings: JobsSettings, log: Path = Path(os.devnull)) -> Iterator[subprocess.Popen[bytes]]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BASIC_")}
    own = {
        "BASIC_DATA_DIR": str(settings.data_dir),
        "BASIC_REDIS_URL": settings.redis_url,
        "BASIC_TARGET": settings.target,
    }
    with log.open("ab") as words:
        process = subprocess.Popen([sys.executable, "-m", "jobs.ingest"], env=inherited | own, stderr=words)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def a_batch(database: Database, settings: JobsSettings) -> str:
    content = "".join(_line(index) for index in range(LINES)).encode()
    with database.write() as session:
        files.begin_file(session, "file-1", "batch", "input.jsonl", "")
        for index, start in enumerate(range(0, len(content), files.CHUNK_BYTES)):
            files.append_chunk(session, "file-1", index, content[start : start + files.CHUNK_BYTES])
        files.finish_file(session, "file-1", len(content), None, "batch")
    return create_batch(BatchSubmission("file-1", CHAT_ENDPOINT, "24h", 86_400.0), None, database, settings)


def _line(index: int) -> str:
    message = {"role": "user", "content": "word " * 100}
    body = {"model": "tiny", "messages": [message], "max_tokens": -1 if index in BAD else 8}
    return json.dumps({"custom_id": f"r{index}", "method": "POST", "url": CHAT_ENDPOINT, "body": body}) + "\n"


def value(database: Database, query: str) -> Any:
    with database.read() as session:
        return session.execute(text(query)).scalar()


def wait_for(process: subprocess.Popen[bytes], done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def killed_once(settings: JobsSettings, begun: Callable[[], Any]) -> None:
    """Let a process begin to process a batch, and kill it at once."""
    with an_ingest_process(settings) as process:
        wait_for(process, begun)


def status_of(database: Database) -> str:
    return str(value(database, "SELECT status FROM jobs"))


def test_a_batch_whose_reader_is_killed_is_read_by_the_next_one_and_each_line_is_one_request(
    database: Database, settings: JobsSettings
) -> None:
    a_batch(database, settings)
    killed_once(settings, lambda: value(database, "SELECT count(*) FROM requests"))
    assert status_of(database) == "validating"
    assert 0 < value(database, "SELECT count(*) FROM requests") < LINES
    assert value(database, "SELECT requests_total FROM jobs") == 0, "nothing counts before all is read"

    with an_ingest_process(settings) as process:
        wait_for(process, lambda: status_of(database) != "validating")

    with database.read() as session:
        (job,) = session.execute(text("SELECT status, requests_total, requests_completed, requests_failed FROM jobs"))
        rows = session.execute(text("SELECT custom_id, status FROM requests ORDER BY request_index")).all()
    assert tuple(job) == ("in_progress", LINES, 0, len(BAD))
    assert [row.custom_id for row in rows] == [f"r{index}" for index in range(LINES)]
    assert [index for index, row in enumerate(rows) if row.status == "failed"] == list(BAD)


def test_a_batch_whose_writer_is_killed_has_each_line_once_in_its_files(
    database: Database, settings: JobsSettings
) -> None:
    job_id = a_batch(database, settings)
    with an_ingest_process(settings) as process:
        wait_for(process, lambda: status_of(database) != "validating")
    with database.write() as session:
        writes.request_cancel(session, job_id)
    while True:
        with database.write() as session:
            if not writes.end_jobs(session).more:
                break
    killed_once(settings, lambda: value(database, "SELECT count(*) FROM file_chunks WHERE file_id <> 'file-1'"))
    assert status_of(database) == "cancelling"
    assert value(database, "SELECT error_file_id FROM jobs") is None, "no file is shown before it is whole"

    with an_ingest_process(settings) as process:
        wait_for(process, lambda: status_of(database) == "cancelled")

    chunks = "SELECT data FROM file_chunks JOIN jobs ON file_id = error_file_id ORDER BY chunk_index"
    with database.read() as session:
        content = b"".join(session.scalars(text(chunks)))
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"r{index}" for index in range(LINES)]
    found = Counter("refused" if line["response"] else line["error"]["code"] for line in lines)
    assert found == {"refused": len(BAD), "batch_cancelled": LINES - len(BAD)}


# A full disk, no free memory, a replica: in each state the server answers and refuses writes.
REFUSALS: dict[str, tuple[Callable[[redis.Redis], object], Callable[[redis.Redis], object]]] = {
    "disk": (
        lambda server: server.config_set("min-replicas-to-write", 1),
        lambda server: server.config_set("min-replicas-to-write", 0),
    ),
    "memory": (lambda server: server.config_set("maxmemory", 1), lambda server: server.config_set("maxmemory", 0)),
    "replica": (
        lambda server: server.replicaof("127.0.0.1", str(free_port())),
        lambda server: server.replicaof("NO", "ONE"),
    ),
}


@pytest.mark.parametrize("first", ["it starts", "it refuses"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_redis_server_that_refuses_to_write_is_waited_for(
    database: Database, settings: JobsSettings, tmp_path: Path, kind: str, first: str
) -> None:
    refuse, allow = REFUSALS[kind]
    log = tmp_path / "ingest.log"
    with redis.Redis.from_url(settings.redis_url) as server:
        if first == "it refuses":
            refuse(server)
        try:
            with an_ingest_process(settings, log) as process:
                if first == "it starts":
                    wait_for(process, lambda: "ready" in log.read_text())
                    refuse(server)
                wait_for(process, lambda: "refuses writes" in log.read_text())
                time.sleep(1.0)  # it tries again and is refused again
                allow(server)
                push(PromptBatch(id="pushed", requests=["Hello"]), settings.redis_url)
                wait_for(process, lambda: value(database, "SELECT count(*) FROM jobs"))
                assert log.read_text().count("refuses writes") == 1
        finally:
            allow(server)
