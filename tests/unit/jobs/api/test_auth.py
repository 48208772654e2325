"""API keys: authentication, scopes, rate and stream limits, revocation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from jobs.api.app import make_api
from jobs.api.auth.authentication import Authenticator, RateLimiter
from jobs.api.auth.caller import Caller
from jobs.api.auth.stream_limits import StreamLimits
from jobs.api.server import serve
from jobs.errors import LimitReached, SetupError
from jobs.keys import Scope, check_key
from jobs.settings import JobsSettings
from storage import keys
from storage.models import ApiKey, JobRow
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_key
from tests.unit.jobs.api.document import openapi_document

A_JOB = {"requests": ["Hello"], "max_tokens": 10}


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    authenticator = Authenticator(database, local_key="sk-basic-local-1")
    app = make_api(settings, database, lambda job_id, model: None, authenticator)
    with ApiClient(app, raise_server_exceptions=False) as client:
        yield client


def revoke(database: Database, key: dict[str, str]) -> None:
    found = check_key(database, key["authorization"].removeprefix("Bearer "))
    assert found is not None
    with database.write() as session:
        assert keys.revoke_key(session, found.id)


def test_until_a_key_exists_every_caller_is_accepted(api: TestClient) -> None:
    assert api.post("/v1/jobs", json=A_JOB).status_code == 200
    assert api.get("/v1/jobs", headers={"authorization": "Bearer anything"}).status_code == 200


def test_once_a_key_exists_every_route_below_v1_needs_one(api: TestClient, database: Database) -> None:
    a_key(database)
    paths = openapi_document()["paths"]
    guarded = [(m.upper(), path) for path, methods in paths.items() for m in methods if path.startswith("/v1")]
    assert len(guarded) >= 9
    for method, path in [*guarded, ("GET", "/v1/nothing"), ("OPTIONS", "/v1/jobs"), ("POST", "/v1")]:
        reply = api.request(method, path)
        assert reply.status_code == 401, (method, path)
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["x-request-id"].startswith("req_")
    assert {api.get(path).status_code for path in ("/healthz", "/readyz")} == {200}


def test_all_invalid_keys_get_the_same_answer(api: TestClient, database: Database) -> None:
    right = a_key(database)["authorization"]
    revoked, expired = a_key(database), a_key(database, lasts_s=0.0)
    revoke(database, revoked)
    wrong = [
        {},
        revoked,
        expired,
        {"authorization": right.removeprefix("Bearer ")},
        {"authorization": right[:-1] + ("0" if right[-1] != "0" else "1")},
        {"authorization": right.replace("Bearer", "Basic")},
        {"authorization": right + "x"},
        {"authorization": "Bearer sk-basic-' OR 1=1 --"},
        {"authorization": "Bearer " + "x" * 5000},
    ]
    replies = [api.get("/v1/jobs", headers=headers) for headers in wrong]
    replies.append(api.get("/v1/jobs", params={"api_key": right.removeprefix("Bearer ")}))
    assert {reply.status_code for reply in replies} == {401}
    assert len({reply.text for reply in replies}) == 1


def test_a_revoked_key_is_rejected_from_the_next_request_on(api: TestClient, database: Database) -> None:
    key = a_key(database)
    assert api.get("/v1/jobs", headers=key).status_code == 200
    revoke(database, key)
    assert api.get("/v1/jobs", headers=key).status_code == 401
    assert api.get("/v1/jobs").status_code == 401, "the last key is gone, and a key is still required"


def test_the_database_stores_the_hash_of_a_key_and_not_the_key(database: Database) -> None:
    secret = a_key(database)["authorization"].rpartition("-")[2]
    with database.read() as session:
        row = session.execute(select(ApiKey.__table__)).one()
    assert len(row.secret_sha256) == 64
    assert secret not in str(row)


@pytest.mark.parametrize(
    ("scopes", "reads", "submits"),
    [
        ((Scope.READ,), 200, 403),
        ((Scope.SUBMIT,), 403, 200),
        ((Scope.SUBMIT, Scope.READ), 200, 200),
        ((Scope.ADMIN,), 200, 200),
    ],
)
def test_a_key_may_do_what_its_scopes_allow(
    api: TestClient, database: Database, scopes: tuple[Scope, ...], reads: int, submits: int
) -> None:
    key = a_key(database, *scopes)
    assert api.get("/v1/models", headers=key).status_code == reads
    reply = api.post("/v1/jobs", json=A_JOB, headers=key)
    assert reply.status_code == submits
    if submits == 403:
        assert reply.json()["error"]["code"] == "insufficient_permissions"
        assert reply.json()["error"]["message"] == "This request needs the scope submit; the key has read."


def test_jobs_and_files_belong_to_the_key_that_created_them(api: TestClient, database: Database) -> None:
    key = a_key(database)
    api.post("/v1/jobs", json=A_JOB, headers=key)
    with database.read() as session:
        owner = session.scalar(select(JobRow.api_key_id))
        assert owner == session.scalar(select(ApiKey.id))


def test_jobs_of_other_keys_are_not_found_and_an_admin_sees_all(api: TestClient, database: Database) -> None:
    mine, theirs, admin = a_key(database), a_key(database), a_key(database, Scope.ADMIN)
    job = api.post("/v1/jobs", json=A_JOB, headers=mine).json()["id"]
    calls = [("GET", ""), ("GET", "/outputs"), ("GET", "/stats"), ("GET", "/events"), ("POST", "/cancel")]
    for method, path in calls:
        reply, nowhere = (api.request(method, f"/v1/jobs/{id_}{path}", headers=theirs) for id_ in (job, "x" * len(job)))
        assert reply.status_code == 404, path
        assert reply.text.replace(job, "") == nowhere.text.replace("x" * len(job), "")
    listed = {name: api.get("/v1/jobs", headers=key).json()["data"] for name, key in (("a", admin), ("t", theirs))}
    assert ([found["id"] for found in listed["a"]], listed["t"]) == ([job], [])
    assert api.get("/v1/jobs", params={"after": job}, headers=theirs).status_code == 400
    assert api.post(f"/v1/jobs/{job}/cancel", headers=admin).json()["status"] == "cancelled"


def test_two_keys_may_use_the_same_idempotency_key(api: TestClient, database: Database) -> None:
    once = {"idempotency-key": "k"}
    one, other = (api.post("/v1/jobs", json=A_JOB, headers=a_key(database) | once).json() for _ in range(2))
    assert one["id"] != other["id"]


def test_the_local_key_of_the_data_directory_is_accepted(api: TestClient, database: Database) -> None:
    a_key(database)
    assert api.post("/v1/jobs", json=A_JOB, headers={"authorization": "Bearer sk-basic-local-1"}).status_code == 200


def refused_for_now(reply: Any, code: str = "rate_limit_exceeded") -> str:
    assert reply.status_code == 429, reply.text
    assert int(reply.headers["retry-after"]) > 0
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", code)
    return str(error["message"])


def test_requests_over_the_rate_limit_get_a_retry_after(api: TestClient, database: Database) -> None:
    key, other = a_key(database, requests_per_minute=3), a_key(database, requests_per_minute=3)
    assert [api.get("/v1/models", headers=key).status_code for _ in range(3)] == [200] * 3
    assert refused_for_now(api.get("/v1/models", headers=key)) == "The limit of this key is 3 requests per minute."
    assert api.get("/v1/models", headers=other).status_code == 200


def test_queued_requests_are_limited_per_key_and_a_repeat_does_not_count(api: TestClient, database: Database) -> None:
    key = a_key(database, requests_queued=3)
    first = {"idempotency-key": "first"}
    job = api.post("/v1/jobs", json={"requests": ["a", "b"]}, headers=key | first).json()
    message = refused_for_now(api.post("/v1/jobs", json={"requests": ["a", "b"]}, headers=key))
    assert message == "This key may have 3 requests in the queue; with this job it would have 4."
    assert api.post("/v1/jobs", json={"requests": ["a", "b"]}, headers=key | first).json()["id"] == job["id"]
    assert api.post("/v1/jobs", json={"requests": ["c"]}, headers=key).status_code == 200
    with database.read() as session:
        assert len(session.scalars(select(JobRow.id)).all()) == 2, "what was refused left nothing behind"
    api.post(f"/v1/jobs/{job['id']}/cancel", headers=key)
    assert api.post("/v1/jobs", json={"requests": ["a", "b"]}, headers=key).status_code == 200


def test_queued_tokens_are_counted_by_max_tokens(api: TestClient, database: Database) -> None:
    key = a_key(database, tokens_queued=1000)
    work = {"requests": ["Hello"] * 2, "max_tokens": 100, "n": 4}
    assert api.post("/v1/jobs", json=work, headers=key).status_code == 200
    assert "tokens in the queue" in refused_for_now(api.post("/v1/jobs", json=work, headers=key))
    bomb = a_key(database, tokens_queued=100_000)
    refused_for_now(api.post("/v1/jobs", json={"requests": ["x"], "max_tokens": 2**31 - 1, "n": 128}, headers=bomb))


def test_a_full_queue_rejects_every_key(settings: JobsSettings, database: Database) -> None:
    full = settings.model_copy(update={"max_requests_queued": 1})
    with ApiClient(make_api(full, database, lambda job_id, model: None)) as api:
        assert api.post("/v1/jobs", json=A_JOB).status_code == 200
        message = refused_for_now(api.post("/v1/jobs", json=A_JOB), "queue_full")
    assert message == "The queue would have 2 requests with this job; the limit is 1."


def test_wrong_keys_are_rate_limited_and_valid_ones_from_the_same_address_are_not(
    api: TestClient, database: Database
) -> None:
    key = a_key(database)
    answers = [api.get("/v1/models", headers={"authorization": "Bearer no"}).status_code for _ in range(70)]
    assert answers == [401] * 60 + [429] * 10
    assert api.get("/v1/models", headers=key).status_code == 200


def test_the_rate_window_slides_and_old_names_are_forgotten() -> None:
    now = [0.0]
    rates = RateLimiter(lambda: now[0])
    assert rates.hit("a", 2) == 0
    now[0] = 30.0
    assert [rates.hit("a", 2), rates.hit("a", 2)] == [0, 30.0]
    now[0] = 60.0
    assert [rates.hit("a", 2), rates.hit("a", 2)] == [0, 30.0]
    for stranger in range(20_000):
        rates.hit(str(stranger), 2)
    assert len(rates._times) == 10_000


def test_streams_are_limited_in_total_and_per_key() -> None:
    streams = StreamLimits(max_open=3, max_per_key=2)
    with streams.slot("a"), streams.slot("a"):
        with pytest.raises(LimitReached, match="limit of this key is 2 open"), streams.slot("a"):
            pass
        with streams.slot("b"), pytest.raises(LimitReached, match="limit of 3 open streams"), streams.slot("c"):
            pass
    with streams.slot("a"):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_without_a_key_the_api_server_refuses_to_listen_on_other_addresses(
    settings: JobsSettings, migrated: None, host: str
) -> None:
    with pytest.raises(SetupError, match=r"no API key.*basic keys create"):
        serve(settings.model_copy(update={"api_host": host}))


def test_on_a_public_address_a_key_is_needed_even_if_none_exists(settings: JobsSettings, database: Database) -> None:
    with ApiClient(make_api(settings, database, authenticator=Authenticator(database, keyless=False))) as api:
        assert api.get("/v1/jobs").status_code == 401


def test_an_admin_key_can_list_only_its_own_jobs(api: TestClient, database: Database) -> None:
    theirs, ours = a_key(database), a_key(database, Scope.ADMIN)
    local = {"authorization": "Bearer sk-basic-local-1"}
    ids = [api.post("/v1/jobs", json=A_JOB, headers=headers).json()["id"] for headers in (ours, local, theirs)]
    for headers, own in ((ours, ids[0]), (local, ids[1]), (theirs, ids[2])):
        listed = api.get("/v1/jobs", params={"mine": True}, headers=headers).json()["data"]
        assert [job["id"] for job in listed] == [own]
    assert len(api.get("/v1/jobs", headers=ours).json()["data"]) == 3


def test_revalidating_a_key_does_not_count_against_its_rate_limit(database: Database) -> None:
    authorization = a_key(database, requests_per_minute=1)["authorization"]
    key = authorization.removeprefix("Bearer ")
    authenticator = Authenticator(database, local_key="sk-basic-local-1")
    caller = authenticator.authenticate(authorization, "", Scope.READ)

    def stays(key: str, caller: Caller) -> bool:
        with database.read() as session:
            return authenticator.is_still_valid(key, caller, session)

    assert all(stays(key, caller) for _ in range(5))
    assert stays("sk-basic-local-1", Caller()), "who can read the data directory"
    assert not stays("", Caller()), "let in while there was no key"
    revoke(database, {"authorization": authorization})
    assert not stays(key, caller)
