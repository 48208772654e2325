"""The OpenAPI document: documented bodies are valid, and every field is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient

from jobs.api.app import make_api
from jobs.settings import JobsSettings
from jobs.submission.fields import PARAMETERS
from tests.api_client import ApiClient
from tests.databases import on_sqlite
from tests.paths import ROOT
from tests.unit.jobs.api.document import openapi_document

_CURL_BODY = re.compile(r"/v1/jobs[^\n]*\\\n\s+-d '([^']+)'")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service for all cases."""
    folder = tmp_path_factory.mktemp("openapi")
    settings = JobsSettings(data_dir=folder, redis_url="redis://127.0.0.1:1/0", target="tiny", max_requests=5)
    with on_sqlite(folder) as database, ApiClient(make_api(settings, database, lambda job_id, model: None)) as client:
        yield client


@pytest.fixture
def document() -> dict[str, Any]:
    return openapi_document()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def validate(document: dict[str, Any], name: str, body: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


@pytest.mark.parametrize("file", ["docs/clients.md", "examples/curl.sh"])
def test_documented_example_bodies_are_valid(api: TestClient, document: dict[str, Any], file: str) -> None:
    bodies = [json.loads(body) for body in _CURL_BODY.findall((ROOT / file).read_text())]
    assert bodies
    for body in bodies:
        validate(document, "JobSubmission", body)
        assert api.post("/v1/jobs", json=body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompts": ["Hello"], "parameters": {"max_tokens": 5, "stop": "."}, "metadata": {"team": "a"}},
        {"requests": ["Hello", {"prompt": "Bye", "custom_id": "b", "logit_bias": {"5": -1}}], "temperature": None},
        {"requests": [{"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}]},
        {"requests": [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}], "stop": ["a"]},
    ],
)
def test_every_form_of_a_submission_is_valid_by_the_document(
    api: TestClient, document: dict[str, Any], body: dict[str, Any]
) -> None:
    validate(document, "JobSubmission", body)
    assert api.post("/v1/jobs", json=body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [{"prompts": ["Hello"], "max_token": 5}, {"prompts": ["Hello"], "temperature": "hot"}, {"prompts": "Hello"}],
)
def test_rejected_submissions_are_invalid_by_the_document(
    api: TestClient, document: dict[str, Any], body: dict[str, Any]
) -> None:
    assert api.post("/v1/jobs", json=body).status_code == 400
    with pytest.raises(jsonschema.ValidationError):
        validate(document, "JobSubmission", body)


def test_every_parsed_field_is_in_the_document(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    job = {"model", "endpoint", "metadata", "completion_window", "parameters", "compare_plain"}
    job |= {"requests", "prompts", "input_file_id", "name", "labels", "priority", "max_concurrent", "budget", "pilot"}
    assert schemas["JobSubmission"]["properties"].keys() == PARAMETERS | job
    given = {"input", "instructions", "previous_response_id"}
    request = {"custom_id", "id", "prompt", "messages", "model", "timeout_s", "keep"} | given
    assert schemas["JobRequest"]["properties"].keys() == PARAMETERS | request
    assert schemas["ChatCall"]["properties"].keys() == PARAMETERS | {"model", "messages"}
    assert schemas["CompletionCall"]["properties"].keys() == PARAMETERS | {"model", "prompt"}
    assert schemas["ResponseCall"]["properties"].keys() == PARAMETERS | {"model"} | given
    submit = document["paths"]["/v1/jobs"]["post"]["parameters"]
    assert {"Idempotency-Key", "traceparent", "max_tokens", "endpoint", "metadata"} <= {
        field["name"] for field in submit
    }


def test_every_operation_has_a_tag_security_and_a_response_type(document: dict[str, Any]) -> None:
    named = {tag["name"] for tag in document["tags"]}
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(ids) == len(set(ids))
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for name, operation in operations(document):
        assert set(operation["tags"]) <= named, name
        assert ("security" in operation) == ("/v1" in name), name
        for content in operation["responses"]["200"]["content"].values():
            assert content["schema"], name


def test_all_references_of_the_document_resolve(document: dict[str, Any]) -> None:
    for name in re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]


def test_the_docs_page_uses_no_other_host(api: TestClient) -> None:
    page = api.get("/docs")
    assert page.status_code == 200
    assert re.findall(r"https?:|[\"']//", page.text) == []
    assert "default-src 'self'" in page.headers["content-security-policy"]
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(parts) == 3
    for part in parts:
        reply = api.get(f"/{part}")
        assert (reply.status_code, bool(reply.content)) == (200, True), part
    assert api.get("/docs/main.py").status_code == 404
    assert api.get("/docs/..%2Fmain.py").status_code == 404
