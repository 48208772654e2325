"""Every response has exactly the fields of its documented model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from jobs.api.app import make_api
from jobs.api.schemas.replies import (
    BatchPage,
    BatchReply,
    ChatChunk,
    ChatReply,
    ErrorReply,
    FileDeleted,
    FilePage,
    FileReply,
    HealthReply,
    JobPage,
    JobReply,
    JobRowList,
    ModelList,
    ModelReply,
    OutputLine,
    ReadyReply,
    TextChunk,
    TextReply,
    WorkerList,
)
from jobs.messages import PartialEvent
from jobs.settings import JobsSettings
from storage import writes
from storage.queries import JobStats
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_worker_card
from tests.unit.jobs.api.document import openapi_document
from tests.unit.jobs.api.test_routes import answer_all, submitted


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> TestClient:
    return ApiClient(make_api(settings, database, lambda job_id, model: None))


@pytest.fixture
def job_id(api: TestClient, database: Database) -> str:
    """A job with a completed, a rejected and a cancelled request."""
    job: str = submitted(
        api, {"prompt": "Hello", "keep": {"label": 7}}, {"prompt": ""}, "Bye", metadata={"team": "a"}, logprobs=True
    )["id"]
    answer_all(database, limit=1, logprobs=([["Paris.", -0.5]],))
    return job


def test_jobs_match_their_model_in_every_state(api: TestClient, job_id: str) -> None:
    for reply in (
        api.get(f"/v1/jobs/{job_id}"),
        api.post(f"/v1/jobs/{job_id}/cancel"),
        api.post(f"/v1/jobs/{job_id}/retry"),
    ):
        assert JobReply.model_validate_json(reply.content, strict=True).request_counts.total
    assert JobPage.model_validate_json(api.get("/v1/jobs").content, strict=True).data
    assert ErrorReply.model_validate_json(api.get("/v1/jobs/nowhere").content, strict=True)
    stats = TypeAdapter(JobStats).validate_json(api.get(f"/v1/jobs/{job_id}/stats").content, strict=True)
    assert stats.requests_total == 3


def test_output_lines_and_events_match_their_models(api: TestClient, job_id: str) -> None:
    api.post(f"/v1/jobs/{job_id}/cancel")
    for query in ("", "?follow=true", "?prompt=true"):
        lines = api.get(f"/v1/jobs/{job_id}/outputs{query}").text.splitlines()
        read = [OutputLine.model_validate_json(line, strict=True) for line in lines]
        assert sorted(line.status for line in read) == ["cancelled", "completed", "failed"]
        kept = {line.status: (line.keep, line.prompt) for line in read}
        assert kept["completed"] == ({"label": 7}, "Hello" if "prompt" in query else None)
        assert kept["failed"] == (None, None), "a refused line has no prompt"
    events = api.get(f"/v1/jobs/{job_id}/events").text.splitlines()
    told = [PartialEvent.model_validate_json(line[6:]) for line in events if line.startswith("data: ")]
    assert {event.type for event in told} == {"tokens", "finished", "failed", "job"}


def test_files_and_batches_match_their_models(api: TestClient) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny"}}
    form: dict[str, Any] = {"file": ("a.jsonl", json.dumps(line).encode()), "purpose": (None, "batch")}
    file = FileReply.model_validate_json(api.post("/v1/files", files=form).content, strict=True)
    assert FileReply.model_validate_json(api.get(f"/v1/files/{file.id}").content, strict=True) == file
    assert FilePage.model_validate_json(api.get("/v1/files").content, strict=True).data == [file]
    order = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = BatchReply.model_validate_json(api.post("/v1/batches", json=order).content, strict=True)
    assert BatchReply.model_validate_json(api.get(f"/v1/batches/{batch.id}").content, strict=True).id == batch.id
    assert BatchPage.model_validate_json(api.get("/v1/batches").content, strict=True).data
    assert BatchReply.model_validate_json(api.post(f"/v1/batches/{batch.id}/cancel").content, strict=True)
    assert FileDeleted.model_validate_json(api.delete(f"/v1/files/{file.id}").content, strict=True)


def test_service_responses_match_their_models(api: TestClient, job_id: str) -> None:
    for path, model in {
        "/v1/models": ModelList,
        "/v1/models/tiny": ModelReply,
        "/v1/workers": WorkerList,
        "/v1/stats/jobs": JobRowList,
        "/v1/stats": JobStats,
        "/healthz": HealthReply,
        "/readyz": ReadyReply,
    }.items():
        assert TypeAdapter(model).validate_json(api.get(path).content, strict=True), path


@pytest.mark.parametrize(
    ("path", "body", "whole", "piece"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}, ChatReply, ChatChunk),
        ("/v1/completions", {"prompt": "Hello"}, TextReply, TextChunk),
    ],
)
def test_completions_match_their_models(
    settings: JobsSettings, database: Database, path: str, body: dict[str, Any], whole: Any, piece: Any
) -> None:
    with database.write() as session:
        writes.register_worker(session, a_worker_card(target="tiny"))
    api = ApiClient(make_api(settings, database, lambda job_id, model: answer_all(database, numerics="fp_1")))
    call = {**body, "model": "tiny"}
    assert whole.model_validate_json(api.post(path, json=call).content, strict=True).system_fingerprint == "fp_1"
    streamed = api.post(path, json={**call, "stream": True, "stream_options": {"include_usage": True}})
    data = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    last = [piece.model_validate_json(one, strict=True) for one in data][-1]
    assert last.usage
    assert last.system_fingerprint == "fp_1"


def test_every_route_of_jobs_declares_its_response() -> None:
    document = openapi_document()
    schemas = document["components"]["schemas"]

    def names(part: Any) -> set[str]:
        if isinstance(part, dict):
            own = {part["$ref"].rpartition("/")[2]} if "$ref" in part else set()
            return own.union(*map(names, part.values()))
        return set().union(*map(names, part)) if isinstance(part, list) else set()

    replies = {
        f"{method} {path}": operation["responses"]["200"]
        for path, methods in document["paths"].items()
        if path.startswith("/v1/jobs")
        for method, operation in methods.items()
    }
    assert len(replies) >= 8
    assert [route for route, reply in replies.items() if not names(reply)] == []
    assert names(document) <= schemas.keys()
