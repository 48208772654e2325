"""A client that a generator writes from the OpenAPI document, in its own process, talks to the application."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from jobs.api.app import make_api
from jobs.settings import JobsSettings
from storage.session import Database
from tests.unit.jobs.api.test_routes import answer_all


@pytest.fixture
def api(database: Database, tmp_path: Path) -> Iterator[TestClient]:
    settings = JobsSettings(data_dir=tmp_path, redis_url="redis://127.0.0.1:1/0", target="tiny", max_requests=5)
    with TestClient(make_api(settings, database, lambda job_id, model: None)) as client:
        yield client


@pytest.mark.filterwarnings("ignore:invalid decimal literal")  # in generated code that is not formatted
def test_a_client_that_is_generated_from_the_document_submits_and_reads_a_job(
    api: TestClient, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, settings, package = tmp_path / "openapi.json", tmp_path / "settings.json", tmp_path / "generated_client"
    described.write_text(api.get("/openapi.json").text)
    settings.write_text('{"post_hooks": []}')  # they would format the code
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    command += ["--path", str(described), "--output-path", str(package), "--config", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    client = importlib.import_module("generated_client").Client(base_url="http://testserver")
    client.set_httpx_client(api)

    def call(name: str) -> Any:
        return importlib.import_module(f"generated_client.api.{name}")

    models = importlib.import_module("generated_client.models")
    body = models.JobSubmission(prompts=["Name two rivers."], max_tokens=40, temperature=0)
    job = call("jobs.submit_v1_jobs_post").sync(client=client, body=body, idempotency_key="k")
    assert (job.status, job.request_counts.total) == ("in_progress", 1)
    answer_all(database, text="The Rhine and the Elbe.")
    read = call("jobs.retrieve_v1_jobs_job_id_get").sync(job.id, client=client)
    assert (read.id, read.status) == (job.id, "completed")
    listed = call("jobs.list_jobs_v1_jobs_get").sync(client=client)
    assert [found.id for found in listed.data] == [job.id]
    lines = call("jobs.outputs_v1_jobs_job_id_outputs_get").sync_detailed(job.id, client=client).content.splitlines()
    assert [models.OutputLine.from_dict(json.loads(line)).choices[0].text for line in lines] == [
        "The Rhine and the Elbe."
    ]
    missing = call("jobs.retrieve_v1_jobs_job_id_get").sync("nowhere", client=client)
    assert "nowhere" in missing.error.message
