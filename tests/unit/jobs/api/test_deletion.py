"""Deleting jobs and responses through the API, the client and the command line, and reading what was pruned by age."""

from __future__ import annotations

import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import func, select

from jobs.api import dependencies
from jobs.api.app import make_api
from jobs.api.schemas.replies import ErrorReply, JobDeleted, ResponseDeleted
from jobs.client import Client
from jobs.errors import NotDeletable, NotFound
from jobs.settings import JobsSettings
from jobs.upkeep.pruner import Pruner, ages_of, prune_all
from storage import erasure
from storage.models import ChoiceOutput, FileChunk, JobRow, Request
from storage.prune import Ages
from storage.session import Database
from tests.factories import a_key
from tests.in_process import InProcess
from tests.unit.jobs.api.test_routes import answer_all, submitted
from tests.unit.jobs.openai_client import uploaded
from tests.unit.storage.acts import claim, flush, whole


def rows(database: Database, *models: type) -> list[int]:
    with database.read() as session:
        return [session.scalar(select(func.count()).select_from(model)) or 0 for model in models]


def test_a_job_that_has_ended_is_erased_and_one_that_runs_only_on_request(
    api: TestClient, database: Database, settings: JobsSettings
) -> None:
    done = submitted(api, "Hello", "Bye")["id"]
    answer_all(database)
    reply = api.delete(f"/v1/jobs/{done}")
    assert JobDeleted.model_validate(reply.json()).id == done
    assert rows(database, Request, ChoiceOutput) == [0, 0]
    for path in ("", "/outputs", "/events", "/stats"):
        assert api.get(f"/v1/jobs/{done}{path}").status_code == 404
    assert api.delete(f"/v1/jobs/{done}").status_code == 404

    runs = submitted(api, "Hello")["id"]
    refused = api.delete(f"/v1/jobs/{runs}")
    assert refused.status_code == 409
    error = ErrorReply.model_validate(refused.json()).error
    assert error.code == "not_deletable"
    assert "in_progress" in error.message
    assert "cancel=true" in error.message
    assert api.delete(f"/v1/jobs/{runs}?cancel=true").status_code == 200
    assert rows(database, JobRow, Request) == [2, 0], "their own rows are the pruner's"
    Pruner(database, settings).run_once()
    assert rows(database, JobRow) == [0]


def test_a_job_whose_worker_has_its_requests_is_hidden_at_once_and_erased_when_the_worker_lets_go(
    api: TestClient, database: Database, settings: JobsSettings
) -> None:
    job = submitted(api, "Hello")["id"]
    (claimed,) = claim(database)
    assert api.delete(f"/v1/jobs/{job}?cancel=true").status_code == 200
    assert api.get(f"/v1/jobs/{job}").status_code == 404
    assert api.get("/v1/jobs").json()["data"] == []
    pruner = Pruner(database, settings)
    pruner.run_once()
    assert rows(database, JobRow) == [1], "the worker still writes"
    flush(database, "w1", whole(claimed.lease, 1))
    pruner.run_once()
    assert rows(database, JobRow, Request, ChoiceOutput) == [0, 0, 0]


def test_what_a_call_has_no_time_for_is_erased_by_the_pruner(
    api: TestClient, database: Database, settings: JobsSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependencies, "_ERASE_S", -1.0)
    monkeypatch.setattr(erasure, "REQUESTS_PER_DELETE", 1)
    job = submitted(api, "Hello", "Bye", "Again")["id"]
    answer_all(database)
    assert api.delete(f"/v1/jobs/{job}").status_code == 200
    assert rows(database, Request) == [2]
    assert api.get(f"/v1/jobs/{job}").status_code == 404
    Pruner(database, settings).run_once()
    assert rows(database, JobRow, Request) == [0, 0]


def test_a_job_takes_the_uploaded_file_that_it_was_read_from_along(
    api: TestClient, client: OpenAI, database: Database
) -> None:
    file = uploaded(client, b'"Hello"\n').id
    jobs = [api.post("/v1/jobs", json={"input_file_id": file}).json()["id"] for _ in range(2)]
    for job, left in zip(jobs, (1, 0), strict=True):
        api.delete(f"/v1/jobs/{job}?cancel=true")
        assert rows(database, FileChunk) == [left]
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file)


def test_only_the_owner_deletes_a_job(api: TestClient, database: Database) -> None:
    job = submitted(api, "Hello")["id"]
    assert api.delete(f"/v1/jobs/{job}?cancel=true", headers=a_key(database)).status_code == 404
    assert rows(database, JobRow) == [1]


def test_the_openai_client_deletes_a_response_that_has_ended(
    api: TestClient, client: OpenAI, database: Database
) -> None:
    response = client.responses.create(model="tiny", input="Hello", background=True)
    with pytest.raises(openai.ConflictError, match="Cancel it"):
        client.responses.delete(response.id)
    answer_all(database)
    ResponseDeleted.model_validate(api.delete(f"/v1/responses/{response.id}").json())
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    assert rows(database, Request, ChoiceOutput) == [0, 0]


def test_the_client_deletes_jobs(settings: JobsSettings, database: Database) -> None:
    api = make_api(settings, database, lambda *_: None)
    with Client("http://service", transport=InProcess(api)) as client:
        job = client.submit(["Hello"])
        with pytest.raises(NotDeletable):
            job.delete()
        job.delete(cancel=True)
        with pytest.raises(NotFound):
            client.delete(job.id)


def test_outputs_that_were_pruned_are_named_as_such_and_prompts_cannot_be_retried(
    api: TestClient, database: Database
) -> None:
    job = submitted(api, "Hello", "Bye")["id"]
    answer_all(database, limit=1)
    api.post(f"/v1/jobs/{job}/cancel")
    assert prune_all(database, Ages(prompts_s=-1.0, outputs_s=-1.0, by_key=False))["outputs"] == 1
    lines = api.get(f"/v1/jobs/{job}/outputs?prompt=true").text.splitlines()
    assert '"code":"output_deleted"' in lines[0].replace(": ", ":")
    assert "because of its age" in lines[0]
    assert "batch_cancelled" in lines[1]
    shown = api.get(f"/v1/jobs/{job}").json()
    assert isinstance(shown["prompts_deleted_at"], int)
    assert isinstance(shown["outputs_deleted_at"], int)
    refused = api.post(f"/v1/jobs/{job}/retry")
    assert refused.status_code == 409
    assert "deleted because of their age" in refused.json()["error"]["message"]
    assert api.get(f"/v1/jobs/{job}/events").status_code == 200


def test_ages_are_those_of_the_settings(settings: JobsSettings) -> None:
    given = settings.model_copy(update={"prompt_days": 1.5, "step_days": 30.0})
    assert ages_of(given) == Ages(prompts_s=129_600.0, outputs_s=None, steps_s=2_592_000.0)
