"""Long responses over a real connection: how they end when they are cut off."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy.exc import OperationalError

from jobs.api.app import make_api
from jobs.api.auth.revocation import RevocationMonitor
from jobs.api.http.h11_protocol import TimeoutH11Protocol
from jobs.api.routes.job_outputs import OutputSource
from jobs.settings import JobsSettings
from jobs.streaming import sse
from storage import files, keys
from storage.session import Database
from tests.databases import on_sqlite
from tests.factories import a_key
from tests.unit.storage.acts import cancel, record


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with on_sqlite(tmp_path) as database:
        yield database


@pytest.fixture
def url(database: Database, redis_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of an API server on a thread, so that a test can patch its parts."""
    api = make_api(JobsSettings(data_dir=tmp_path, redis_url=redis_url), database)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(api, http=TimeoutH11Protocol, log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        serving.start()
        yield "http://{}:{}".format(*listener.getsockname())
        server.should_exit = True
        serving.join()


@contextmanager
def streamed(url: str, path: str, headers: dict[str, str] | None = None) -> Iterator[Iterator[bytes]]:
    with httpx.stream("GET", url + path, headers=headers, timeout=30) as reply:
        assert reply.status_code == 200
        yield reply.iter_raw()


def revoke(database: Database) -> None:
    with database.write() as session:
        assert all(keys.revoke_key(session, key.id) for key in keys.list_keys(session)[:1])


@pytest.mark.parametrize("path", ["/v1/jobs/job-1/events", "/v1/jobs/job-1/outputs?follow=true"])
def test_a_stream_whose_key_is_revoked_is_cut_off_within_a_second_or_two(
    database: Database, url: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[set[str]] = []
    check = RevocationMonitor._valid_keys

    def noted(monitor: RevocationMonitor, key_ids: set[str]) -> set[str]:
        checked.append(key_ids)
        return check(monitor, key_ids)

    monkeypatch.setattr(RevocationMonitor, "_valid_keys", noted)
    revoked, other = a_key(database), a_key(database)
    (owner, stranger) = (key.id for key in _in_order(database))
    record(database, "job-1", 3, api_key_id=owner)
    record(database, "job-2", 3, api_key_id=stranger)
    with database.write() as session:  # gives the stream a first line
        session.connection().exec_driver_sql(
            "UPDATE requests SET status = 'failed', error_message = 'No.', event_number = 1 WHERE request_index = 0"
        )
        session.connection().exec_driver_sql("UPDATE jobs SET event_number = 1, requests_failed = 1")
    with streamed(url, path, revoked) as cut, streamed(url, path.replace("job-1", "job-2"), other) as kept:
        assert next(cut)
        assert next(kept)
        revoke(database)
        checked.clear()
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            for _ in cut:
                pass
        assert sum(owner in key_ids for key_ids in checked) <= 3, "twice a second"
        assert httpx.get(url + path, headers=revoked, timeout=240).status_code == 401
        cancel(database, "job-2")
        assert b"".join(kept)  # to its end


def _in_order(database: Database) -> list[Any]:
    with database.read() as session:
        return list(keys.list_keys(session))


def _break(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: Exception, after: int) -> None:
    """Replace a function by one that works for `after` calls and then raises."""
    real, calls = getattr(place, name), [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, broken)


ERRORS = [RuntimeError("a bug"), OperationalError("SELECT", {}, Exception("gone"))]


@pytest.mark.parametrize("error", ERRORS, ids=["a bug", "no database"])
@pytest.mark.parametrize(
    ("path", "place", "name"),
    [
        ("/v1/jobs/job-1/outputs", OutputSource, "_line"),
        ("/v1/jobs/job-1/outputs?follow=true", OutputSource, "_line"),
        ("/v1/jobs/job-1/events", sse, "encode_event"),
    ],
)
def test_lines_that_break_off_do_not_look_complete(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch, path: str, place: Any, name: str, error: Exception
) -> None:
    record(database, "job-1", 450)
    cancel(database)
    _break(monkeypatch, place, name, error, after=250)
    with streamed(url, path) as body, pytest.raises(httpx.RemoteProtocolError):
        for _ in body:
            pass


def test_a_file_that_breaks_off_does_not_look_complete(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with httpx.Client(base_url=url, timeout=240) as http:
        content = b"x" * (3 * files.CHUNK_BYTES)
        file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", content)}).json()
    _break(monkeypatch, files, "chunk", RuntimeError("a bug"), after=2)
    with streamed(url, f"/v1/files/{file['id']}/content") as body, pytest.raises(httpx.RemoteProtocolError):
        for _ in body:
            pass
