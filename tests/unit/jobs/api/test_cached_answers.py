"""What the API says of copied answers, and whose requests get any."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from jobs.api.app import make_api
from jobs.settings import JobsSettings
from storage import keys, leases, writes
from storage.cached_answers import CacheScope, Repeats, copy_answers
from storage.models import Request
from storage.records import RequestProgress
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_checkpoint, a_finished_choice, a_key
from tests.unit.jobs.api.test_metrics import scrape

GREEDY: dict[str, Any] = {"max_tokens": 5, "temperature": 0}


def client(settings: JobsSettings, database: Database) -> TestClient:
    return ApiClient(make_api(settings, database, lambda *_: None), raise_server_exceptions=False)


def submit(api: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> str:
    reply = api.post("/v1/jobs", json={"requests": ["Hello"], **GREEDY, **fields}, headers=headers)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def identity(database: Database, job_id: str) -> str | None:
    with database.read() as session:
        return session.scalar(select(Request.identity).where(Request.job_id == job_id))


def serve(database: Database) -> int:
    """Play a worker with the cache; return how many requests it has computed."""
    repeats = Repeats(CacheScope("scope", "fp_1"))
    with database.write() as session:
        claims = leases.claim(session, "w", "tiny", 10, 30.0, repeats=repeats)
    checkpoint, end = a_checkpoint(text="Paris.", seq=1), a_finished_choice(text="Paris.", last_seq=2)
    progress = [RequestProgress(claim.lease, (checkpoint,), (end,), ends=True) for claim in claims]
    with database.write() as session:
        writes.flush(session, "w", 30.0, progress, [], "fp_1")
        copy_answers(session, repeats.answered, repeats.scope)
    return len(claims)


def test_a_copy_is_named_in_job_usage_outputs_and_metrics(settings: JobsSettings, database: Database) -> None:
    with client(settings, database) as api:
        first = submit(api)
        assert serve(database) == 1
        second = submit(api)
        assert serve(database) == 0
        for job_id, cached, tokens in ((first, 0, None), (second, 1, 7)):
            progress = api.get(f"/v1/jobs/{job_id}").json()["progress"]
            (line,) = api.get(f"/v1/jobs/{job_id}/outputs").text.splitlines()
            assert (progress["requests_cached"], progress["cached_tokens"]) == (cached, tokens or 0)
            assert f'"cached_answer_tokens":{tokens}' in line.replace(" ", "") or tokens is None
            assert (f"{first}/0" in line) is bool(cached)
        assert progress["tokens_per_s"] in (None, 0)
        seen = scrape(api)
    assert seen.of("basic_requests_cached_total", "tiny") == 1
    assert (seen.of("basic_tokens_total", "tiny", "prompt"), seen.of("basic_tokens_total", "tiny", "completion")) == (
        5,
        2,
    )
    assert seen.of("basic_cached_tokens_total", "tiny", "prompt") == 5


def test_no_key_gets_the_answers_of_another_and_a_key_can_do_without(
    settings: JobsSettings, database: Database
) -> None:
    without = a_key(database)
    with database.write() as session:
        (only,) = keys.list_keys(session)
        keys.change_cache(session, only.id, False)
    mine, theirs = a_key(database), a_key(database)
    with client(settings, database) as api:
        found = [identity(database, submit(api, key)) for key in (mine, mine, theirs, without)]
    assert found[0] == found[1] != found[2] is not None
    assert found[3] is None


@pytest.mark.parametrize(
    ("setting", "field", "kept"),
    [("on", None, True), ("on", False, False), ("opt-in", None, False), ("opt-in", True, True), ("off", True, False)],
)
def test_the_setting_and_the_field_decide_together(
    settings: JobsSettings, database: Database, setting: str, field: bool | None, kept: bool
) -> None:
    with client(settings.model_copy(update={"cache": setting}), database) as api:
        assert (identity(database, submit(api, cache=field)) is not None) is kept
