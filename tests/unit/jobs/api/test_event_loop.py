"""Work that grows with its input runs in threads: on the event loop it would block all other requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from jobs.api.app import make_api
from jobs.api.http import multipart
from jobs.api.http.body import SMALL_BYTES, Body
from jobs.api.routes.job_outputs import OutputSource
from jobs.openai import completions
from jobs.openai.logprobs import logprobs_object
from jobs.settings import JobsSettings
from jobs.streaming.sse import encode_page
from storage import writes
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_worker_card
from tests.unit.jobs.api.test_routes import answer_all, submitted

LINES = {"content-type": "application/x-ndjson"}


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> TestClient:
    own = settings.model_copy(update={"max_body_bytes": 10_000_000, "max_file_bytes": 10_000_000})
    return ApiClient(make_api(own, database, lambda job_id, model: answer_all(database)))


def on_loop(call: Callable[..., Any], found: list[bool]) -> Callable[..., Any]:
    """Wrap a function to record whether it runs on the event loop."""

    def noted(*arguments: Any, **fields: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            found.append(False)
        else:
            found.append(True)
        return call(*arguments, **fields)

    return noted


def test_a_large_body_is_hashed_and_stored_in_a_thread(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    monkeypatch.setattr(Body, "add", on_loop(Body.add, found))
    body = b'"Hello"\n' + b" " * (4 * SMALL_BYTES) + b"\n"
    assert api.post("/v1/jobs", content=body, headers=LINES).status_code == 200
    assert found
    assert not any(found)


def test_an_upload_is_parsed_in_a_thread(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    monkeypatch.setattr(multipart.UploadForm, "feed", on_loop(multipart.UploadForm.feed, found))
    form: dict[str, Any] = {"file": ("a.jsonl", b"\r\n" * 3_000_000), "purpose": (None, "batch")}
    file = api.post("/v1/files", files=form).json()
    assert file["bytes"] == 6_000_000
    assert api.get(f"/v1/files/{file['id']}/content").content == b"\r\n" * 3_000_000
    assert found
    assert not any(found)


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/batches", "/v1/files", "/v1/stats/jobs", "/v1/stats", "/v1/workers"])
def test_a_list_is_rendered_in_the_thread_that_read_it(
    api: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    submitted(api)
    found: list[bool] = []
    monkeypatch.setattr(json, "dumps", on_loop(json.dumps, found))
    assert api.get(path).status_code == 200
    assert found
    assert not any(found)


def test_outputs_and_events_are_written_in_a_thread(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submitted(api, "Hello", "Bye")["id"]
    found: list[bool] = []
    monkeypatch.setattr(OutputSource, "_line", on_loop(OutputSource._line, found))
    monkeypatch.setattr("jobs.streaming.hub.encode_page", on_loop(encode_page, found))
    assert len(api.get(f"/v1/jobs/{job}/outputs").text.splitlines()) == 2
    assert len(api.get(f"/v1/jobs/{job}/outputs?follow=true").text.splitlines()) == 2
    assert "finished" in api.get(f"/v1/jobs/{job}/events").text
    assert len(found) >= 5
    assert not any(found)


@pytest.mark.parametrize("stream", [False, True])
def test_a_single_answer_and_its_log_probabilities_are_written_in_a_thread(
    settings: JobsSettings, database: Database, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with database.write() as session:
        writes.register_worker(session, a_worker_card(target="tiny"))
    told = ([["Paris.", -0.5]],)
    api = ApiClient(make_api(settings, database, lambda job_id, model: answer_all(database, logprobs=told)))
    found: list[bool] = []
    monkeypatch.setattr("jobs.openai.completions.logprobs_object", on_loop(logprobs_object, found))
    monkeypatch.setattr(completions, "usage", on_loop(completions.usage, found))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "stream": stream}
    assert "Paris." in api.post("/v1/chat/completions", json=body).text
    assert found
    assert not any(found)
