"""Access to the download of a job's outputs: log-in, and the right to see the job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from jobs.api.app import make_api
from jobs.api.auth.authentication import Authenticator
from jobs.dashboard.app import _add_login
from jobs.dashboard.body_limit import DashboardBodyLimit
from jobs.dashboard.session import Sessions
from jobs.dashboard.transfers import add_transfers
from jobs.settings import JobsSettings
from storage import keys
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_key
from tests.unit.jobs.api.test_routes import answer_all

A_JOB = {"requests": ["Hello", "World"], "max_tokens": 10}


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    """The API server with the routes of the pages that need no socket."""
    authenticator = Authenticator(database)
    app = make_api(settings, database, lambda job_id, model: None, authenticator)
    sessions = Sessions(authenticator)
    _add_login(app, sessions)
    add_transfers(app, app.state.services, sessions)
    app.add_middleware(DashboardBodyLimit)
    with ApiClient(app, follow_redirects=False) as client:
        yield client


def submit(api: TestClient, database: Database, headers: dict[str, str] | None = None) -> str:
    job_id = str(api.post("/v1/jobs", json=A_JOB, headers=headers).json()["id"])
    answer_all(database)
    return job_id


def log_in(api: TestClient, key: dict[str, str]) -> None:
    reply = api.post("/dashboard/login", data={"key": key["authorization"].removeprefix("Bearer ")})
    assert (reply.status_code, reply.headers["location"]) == (303, "/dashboard/")


def test_without_keys_outputs_are_saved_under_the_name_of_the_job(api: TestClient, database: Database) -> None:
    job_id = submit(api, database)
    reply = api.get(f"/dashboard/jobs/{job_id}/outputs")
    assert reply.headers["content-disposition"] == f'attachment; filename="{job_id}.jsonl"'
    assert reply.text == api.get(f"/v1/jobs/{job_id}/outputs").text != ""


def test_saving_outputs_needs_a_log_in_and_nothing_else(api: TestClient, database: Database) -> None:
    mine, theirs = a_key(database), a_key(database)
    job_id = submit(api, database, mine)
    place = f"/dashboard/jobs/{job_id}/outputs"
    assert (api.get(place).status_code, api.get(place).headers["location"]) == (303, "/dashboard/login")
    log_in(api, mine)
    assert api.get(place).text == api.get(f"/v1/jobs/{job_id}/outputs", headers=mine).text
    log_in(api, theirs)
    assert api.get(place).status_code == 404


def test_a_revoked_key_saves_no_outputs(api: TestClient, database: Database) -> None:
    key = a_key(database)
    place = f"/dashboard/jobs/{submit(api, database, key)}/outputs"
    log_in(api, key)
    assert api.get(place).status_code == 200
    with database.write() as session:
        assert all(keys.revoke_key(session, found.id) for found in keys.list_keys(session))
    assert api.get(place).status_code == 303


def test_the_signed_report_of_a_verification_is_its_owner_s(api: TestClient, database: Database) -> None:
    mine, theirs = a_key(database), a_key(database)
    job_id = submit(api, database, mine)
    verified = api.post(f"/v1/jobs/{job_id}/verifications", json={"sample": 1}, headers=mine).json()["id"]
    place = f"/dashboard/verifications/{verified}/report"
    assert (api.get(place).status_code, api.get(place).headers["location"]) == (303, "/dashboard/login")
    log_in(api, mine)
    assert api.get(place).status_code == 409, "it has not ended"
    answer_all(database)
    saved = api.get(place)
    assert saved.headers["content-disposition"] == f'attachment; filename="{verified}.json"'
    assert saved.json() == api.get(f"/v1/verifications/{verified}/report", headers=mine).json()
    assert api.get(f"/dashboard/verifications/{job_id}/report").status_code == 404, "it is no verification"
    log_in(api, theirs)
    assert api.get(place).status_code == 404


def test_a_download_counts_as_a_stream(settings: JobsSettings, api: TestClient, database: Database) -> None:
    place = f"/dashboard/jobs/{submit(api, database)}/outputs"
    app = api.app
    streams = app.state.stream_limits  # type: ignore[attr-defined]
    with streams.slot(""):
        streams._max_open = 1
        assert api.get(place).status_code == 429
    assert api.get(place).status_code == 200
    assert api.get(place).status_code == 200, "the place is given back"


def test_an_overlong_key_is_refused_at_log_in(api: TestClient, database: Database) -> None:
    a_key(database)
    reply = api.post("/dashboard/login", content=b"key=" + b"x" * 5_000)
    assert reply.status_code == 413
    assert reply.json()["error"]["message"] == "The body has more than the 4096 bytes that this page accepts."
