"""Database cost of frequent calls: count statements, for times depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from jobs.api.app import make_api
from jobs.errors import QueueFull
from jobs.keys import Scope
from jobs.settings import JobsSettings
from jobs.submission.intake import QueueDepth
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_key
from tests.unit.jobs.api.test_routes import submitted


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """Yield the list of statements that are executed in the block."""
    asked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        if not statement.startswith("BEGIN"):
            asked.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    yield asked
    event.remove(database.engine, "before_cursor_execute", note)


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> TestClient:
    return ApiClient(make_api(settings, database, lambda job_id, model: None))


def test_a_status_call_reads_the_key_and_the_job_and_nothing_else(api: TestClient, database: Database) -> None:
    job = submitted(api)["id"]
    with statements(database) as asked:
        assert api.get(f"/v1/jobs/{job}").status_code == 200
    assert len(asked) == 2, asked
    key = a_key(database, Scope.ADMIN)
    with statements(database) as asked:
        assert api.get(f"/v1/jobs/{job}", headers=key).status_code == 200
    assert len(asked) == 2, asked


def test_a_small_job_takes_two_inserts_and_no_update(api: TestClient, database: Database) -> None:
    submitted(api)
    with statements(database) as asked:
        submitted(api, "Hello", "Bye")
    assert [statement.split()[0] for statement in asked].count("INSERT") == 2
    assert [statement for statement in asked if statement.startswith("UPDATE")] == []
    assert len(asked) <= 6, asked


def test_a_job_of_rejected_requests_ends_at_once(api: TestClient) -> None:
    job = submitted(api, {"prompt": "Hello", "temperature": -1})
    assert (job["status"], job["request_counts"]) == ("completed", {"total": 1, "completed": 0, "failed": 1})


def test_queued_requests_are_not_recounted_while_the_queue_is_half_empty() -> None:
    now = 0.0
    depth = QueueDepth(lambda: now)
    assert not depth.reserve(1, 100), "nothing is known yet"
    depth.update(10)
    assert depth.reserve(30, 100)
    assert depth.reserve(10, 100), "50 of 100"
    assert not depth.reserve(1, 100), "with what was added since, more than half"
    depth.update(10)
    now = 2.0
    assert not depth.reserve(1, 100), "others may have added since"


def test_a_queue_is_never_filled_beyond_its_limit(settings: JobsSettings, database: Database) -> None:
    own = settings.model_copy(update={"max_requests_queued": 7})
    api = ApiClient(make_api(own, database, lambda job_id, model: None))
    replies = [api.post("/v1/jobs", json={"requests": ["a", "b"]}) for _ in range(5)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429, 429]
    assert replies[-1].json()["error"]["code"] == QueueFull.code
