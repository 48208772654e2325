"""Manage jobs over HTTP: names, labels, search, priorities, limits, pause and resume."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from storage import writes
from storage.models import JobRow
from storage.session import Database
from tests.factories import a_job, some_requests
from tests.unit.jobs.api.test_routes import LINES, Notified, answer_all, api, notified, submitted

__all__ = ["api", "notified"]  # fixtures


def listed(api: TestClient, **query: Any) -> list[str]:
    reply = api.get("/v1/jobs", params=query)
    assert reply.status_code == 200, reply.text
    return [job["id"] for job in reply.json()["data"]]


def error_of(reply: Any) -> dict[str, Any]:
    assert reply.status_code >= 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


def test_a_job_has_the_name_labels_priority_and_limit_of_its_submission(api: TestClient) -> None:
    given = {"name": "Nightly", "labels": {"team": "search"}, "priority": "low", "max_concurrent": 2}
    job = submitted(api, metadata={"run": "7"}, **given)
    plain = submitted(api)

    assert {name: job[name] for name in given} == given | {"labels": {"run": "7", "team": "search"}}
    assert job["metadata"] == job["labels"]
    assert [plain[name] for name in given] == [None, {}, "normal", None]
    assert submitted(api, metadata={"name": " Evening\n run "})["name"] == "Evening run"


def test_lines_take_the_fields_from_the_query(api: TestClient) -> None:
    query: dict[str, str | int] = {"name": "007", "labels": '{"team": "7"}', "priority": "high", "max_concurrent": 3}
    job = api.post("/v1/jobs", params=query, content='"Hello"\n', headers=LINES).json()
    assert (job["name"], job["labels"], job["priority"], job["max_concurrent"]) == ("007", {"team": "7"}, "high", 3)


@pytest.mark.parametrize(
    ("field", "value", "param", "rule"),
    [
        ("name", "", "name", "1 to 128"),
        ("name", "x" * 129, "name", "1 to 128"),
        ("name", "a\nb", "name", "one line"),
        ("name", 7, "name", "text"),
        ("labels", ["team"], "labels", "object"),
        ("labels", {"": "a"}, "labels", "1 to 64"),
        ("labels", {"a=b": "c"}, "labels", "`=`"),
        ("labels", {"k" * 65: "c"}, "labels", "1 to 64"),
        ("labels", {"team": 7}, "labels.team", "must be a string, not a number"),
        ("labels", {"team": "x" * 513}, "labels.team", "at most 512"),
        ("labels", {str(number): "" for number in range(17)}, "labels", "at most 16"),
        ("labels", {"run": "8"}, "labels.run", "another value"),
        ("priority", "urgent", "priority", "high, normal, low"),
        ("priority", 1, "priority", "high, normal, low"),
        ("max_concurrent", 0, "max_concurrent", "from 1"),
        ("max_concurrent", True, "max_concurrent", "from 1"),
    ],
)
def test_an_invalid_value_is_refused_with_its_field_and_rule(
    api: TestClient, field: str, value: Any, param: str, rule: str
) -> None:
    error = error_of(api.post("/v1/jobs", json={"prompts": ["Hello"], "metadata": {"run": "7"}, field: value}))
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert rule in error["message"]


def test_jobs_are_found_by_label_name_status_model_and_text(api: TestClient) -> None:
    first = submitted(api, name="Nightly", labels={"team": "search", "run": "1"})["id"]
    second = submitted(api, name="Weekly", labels={"team": "search"})["id"]
    other = submitted(api)["id"]
    api.post(f"/v1/jobs/{second}/pause")

    assert listed(api, label="team=search") == [second, first]
    assert listed(api, label=["team=search", "run"]) == [first]
    assert listed(api, name="Weekly") == listed(api, search="WEEK") == [second]
    assert listed(api, status="paused") == [second]
    assert listed(api, status=["paused", "in_progress"], model="tiny") == [other, second, first]
    assert listed(api, model="large") == []
    assert error_of(api.get("/v1/jobs?label==a"))["param"] == "label"
    assert error_of(api.get("/v1/jobs?status=paused&status=lost"))["param"] == "status"


def test_a_change_sets_what_it_names_removes_what_is_null_and_leaves_the_rest(api: TestClient) -> None:
    job = submitted(api, name="Nightly", labels={"team": "search", "run": "1"}, max_concurrent=1)
    path = f"/v1/jobs/{job['id']}"

    changed = api.patch(path, json={"labels": {"run": None, "stage": "prod"}, "priority": "high"}).json()
    assert (changed["labels"], changed["priority"]) == ({"team": "search", "stage": "prod"}, "high")
    assert (changed["name"], changed["max_concurrent"]) == ("Nightly", 1)
    changed = api.patch(path, json={"name": None, "labels": None, "max_concurrent": None}).json()
    assert (changed["name"], changed["labels"], changed["metadata"], changed["max_concurrent"]) == (
        None,
        {},
        None,
        None,
    )
    assert listed(api, label="team") == []


def test_a_change_that_is_invalid_changes_nothing(api: TestClient, database: Database) -> None:
    job = submitted(api, labels={str(number): "" for number in range(16)})
    path = f"/v1/jobs/{job['id']}"
    assert error_of(api.patch(path, json={"name": "N", "labels": {"more": "x"}}))["param"] == "labels"
    assert error_of(api.patch(path, json={"names": "N"}))["code"] == "unknown_parameter"
    assert "at least one" in error_of(api.patch(path, json={}))["message"]
    assert api.patch("/v1/jobs/batch_none", json={"name": "N"}).status_code == 404
    assert api.get(path).json() == job

    answer_all(database)
    assert error_of(api.patch(path, json={"priority": "high"}))["code"] == "job_ended"
    assert api.patch(path, json={"name": "Done"}).json()["name"] == "Done"


def test_a_paused_job_runs_again_after_resume_and_its_workers_are_notified(
    api: TestClient, database: Database, notified: Notified
) -> None:
    job = submitted(api)
    path = f"/v1/jobs/{job['id']}"
    for _ in range(2):
        paused = api.post(f"{path}/pause").json()
        assert (paused["status"], paused["pause_reason"]) == ("paused", "user")
        assert paused["paused_at"] >= job["created_at"]
        assert paused["progress"]["time_left_s"] is None
    answer_all(database)
    assert api.get(path).json()["status"] == "paused"
    notified.calls.clear()

    for _ in range(2):
        assert api.post(f"{path}/resume").json() == job
    assert notified.calls == [(job["id"], "tiny")] * 2
    answer_all(database)
    assert error_of(api.post(f"{path}/pause"))["code"] == "job_ended"
    assert error_of(api.post(f"{path}/resume"))["message"] == "Cannot resume a job with status 'completed'."


def test_a_retry_keeps_name_labels_priority_and_limit(api: TestClient) -> None:
    given = {"name": "Nightly", "labels": {"team": "search"}, "priority": "low", "max_concurrent": 2}
    job = submitted(api, **given)
    api.post(f"/v1/jobs/{job['id']}/cancel")
    again = api.post(f"/v1/jobs/{job['id']}/retry").json()
    assert {name: again[name] for name in given} == given


def test_a_batch_is_named_by_its_metadata_and_is_in_progress_for_openai_while_it_is_paused(
    api: TestClient, database: Database
) -> None:
    line = '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "Hi"}}'
    file = api.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", line)}).json()
    order = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = api.post(
        "/v1/batches", json=order | {"metadata": {"name": "Nightly", "team": "a"}, "priority": "low"}
    ).json()
    assert listed(api, label="team=a", name="Nightly") == [batch["id"]]
    assert api.get(f"/v1/jobs/{batch['id']}").json()["priority"] == "low"

    with database.write() as session:
        session.execute(update(JobRow).values(status="in_progress", paused_at=1.0, model="tiny"))
    assert api.get(f"/v1/jobs/{batch['id']}").json()["status"] == "paused"
    assert api.get(f"/v1/batches/{batch['id']}").json()["status"] == "in_progress"
    assert [b["id"] for b in api.get("/v1/batches?status=in_progress").json()["data"]] == [batch["id"]]
    assert error_of(api.get("/v1/batches?status=paused"))["param"] == "status"


def test_an_interactive_request_is_neither_paused_nor_changed(api: TestClient, database: Database) -> None:
    with database.write() as session:
        writes.insert_job(session, a_job("chatcmpl-1", priority=1), some_requests(1))
    assert error_of(api.post("/v1/jobs/chatcmpl-1/pause"))["code"] == "interactive_request"
    assert error_of(api.patch("/v1/jobs/chatcmpl-1", json={"name": "N"}))["code"] == "interactive_request"
