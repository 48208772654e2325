from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from jobs.api.app import make_api
from jobs.api.schemas.replies import NumericsReply
from jobs.keys import Scope
from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT
from jobs.settings import JobsSettings
from storage import leases, numerics, queries, speedup_checks, writes
from storage.models import Request
from storage.numerics import Numerics
from storage.records import RequestPlan, RequestProgress, SpeedupCheckResult
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_checkpoint, a_finished_choice, a_key, a_worker_card

LINES = {"content-type": "application/x-ndjson"}


class Notified:
    """Records the notifications."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, job_id: str, model: str) -> None:
        self.calls.append((job_id, model))


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
def notified() -> Notified:
    return Notified()


@pytest.fixture
def api(settings: JobsSettings, database: Database, notified: Notified) -> Iterator[TestClient]:
    with ApiClient(make_api(settings, database, notified), raise_server_exceptions=False) as client:
        yield client


def submitted(api: TestClient, *requests: Any, **fields: Any) -> dict[str, Any]:
    reply = api.post("/v1/jobs", json={"requests": list(requests) or ["Hello"], **fields})
    assert reply.status_code == 200, reply.text
    job: dict[str, Any] = reply.json()
    return job


def answer_all(
    database: Database,
    text: str = "Paris.",
    limit: int = 10,
    logprobs: tuple[Any, ...] | None = None,
    plan: RequestPlan | None = None,
    numerics: str | None = None,
    **choice: Any,
) -> None:
    """Play the worker, with the same text for every request; `choice` are more fields of its choice."""
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id="w", target="tiny"))
    with database.write() as session:
        claims = leases.claim(session, "w", "tiny", limit, 30.0)
    with database.write() as session:
        progress = [
            RequestProgress(
                claim.lease,
                checkpoints=(a_checkpoint(text=text, seq=1, logprobs=logprobs),),
                finished=(a_finished_choice(text=text, last_seq=2, **choice),),
                ends=True,
                plan=plan,
            )
            for claim in claims
        ]
        writes.flush(session, "w", 30.0, progress, [claim.lease for claim in claims], numerics)


def test_a_submitted_job_is_stored_and_its_workers_notified(api: TestClient, notified: Notified) -> None:
    job = submitted(api, "Hello", {"prompt": "Bye"}, max_tokens=5, metadata={"team": "a"})
    assert job["object"] == "job"
    assert job["status"] == "in_progress"
    assert job["request_counts"] == {"total": 2, "completed": 0, "failed": 0}
    assert (job["metadata"], job["endpoint"], job["completion_window"]) == ({"team": "a"}, CHAT_ENDPOINT, "24h")
    assert job["completed_at"] is None
    assert api.get(f"/v1/jobs/{job['id']}").json() == job
    assert notified.calls == [(job["id"], "tiny")]


def test_parameters_may_be_top_level_or_in_an_object(api: TestClient, database: Database) -> None:
    body = {"prompts": ["Hello"], "parameters": {"max_tokens": 5, "temperature": 0.5}, "temperature": 0}
    job = api.post("/v1/jobs", json=body).json()
    with database.write() as session:
        (claim,) = leases.claim(session, "w", "tiny", 1, 30.0)
    assert claim.lease.job_id == job["id"]
    assert (claim.body["sampling"]["max_tokens"], claim.body["sampling"]["temperature"]) == (5, 0)


def test_lines_are_requests_and_the_query_holds_the_job_fields(api: TestClient) -> None:
    lines = '"Hello"\n{"prompt": "Bye", "custom_id": "b"}\nnot json\n'
    reply = api.post("/v1/jobs?max_tokens=5&model=tiny", content=lines, headers=LINES)
    assert reply.status_code == 200
    assert reply.json()["request_counts"] == {"total": 3, "completed": 0, "failed": 1}


@pytest.mark.parametrize(
    "bad",
    [
        b'{"custom_id": "bad", "prompt": "Nice \\ud83d"}',
        b'{"custom_id": "bad", "prompt": "x", "top_p": NaN}',
        b'{"custom_id": "bad", "prompt": "caf\xe9"}',
        b'{"custom_id": "bad", "prompt": "x"},',
        b'{"custom_id": "bad", "body": {"prompt": "x"}, "metadata": {"row": "7"}}',
        b'{"custom_id": "bad", "prompt": "x", "model": "gpt-9"}',
        b'{"custom_id": "bad", "a\\u0000b": 1}',
    ],
)
def test_one_invalid_line_fails_alone_under_its_own_id(api: TestClient, bad: bytes) -> None:
    good = [b'{"custom_id": "request-2", "prompt": "Hello"}', b'"Bye"']
    for place in range(3):
        lines = b"\n".join([*good[:place], bad, *good[place:]])
        job = api.post("/v1/jobs", content=lines, headers=LINES).json()
        assert job["request_counts"] == {"total": 3, "completed": 0, "failed": 1}
        (failed,) = map(json.loads, api.get(f"/v1/jobs/{job['id']}/outputs").text.splitlines())
        assert (failed["custom_id"], failed["index"]) == ("bad", place)


@pytest.mark.parametrize("content", [b'[{"prompt": "a"}]', b'[\n {\n  "prompt": "a"\n }\n]', b"\x1f\x8b\x08\x00"])
def test_bodies_that_are_not_json_lines_are_rejected_as_a_whole(api: TestClient, content: bytes) -> None:
    reply = api.post("/v1/jobs", content=content, headers=LINES)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("The file is ")
    assert api.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("address", "status"),
    [("/v1/jobs/x%00", 404), ("/v1/jobs?after=x%00", 400), ("/v1/batches/%00", 404), ("/v1/files/%00/content", 404)],
)
def test_u0000_in_a_path_or_query_is_rejected(api: TestClient, address: str, status: int) -> None:
    assert api.get(address).status_code == status


def test_job_lists_accept_order_status_and_an_empty_after(api: TestClient, database: Database) -> None:
    ids = [submitted(api)["id"] for _ in range(3)]
    answer_all(database, limit=1)

    def listed(**query: str) -> list[str]:
        return [job["id"] for job in api.get("/v1/jobs/", params=query).json()["data"]]

    done = listed(status="completed")
    assert len(done) == 1
    assert sorted(listed(status="in_progress") + done) == sorted(ids)
    assert listed(after="") == listed(order="desc") == listed(order="asc")[::-1]
    assert listed(order="asc", after=listed(order="asc")[0]) == listed(order="asc")[1:]
    assert api.get("/v1/jobs?status=nope").json()["error"]["param"] == "status"


def test_a_job_is_accepted_while_redis_is_down(settings: JobsSettings, database: Database) -> None:
    with ApiClient(make_api(settings, database)) as api:
        job = submitted(api)
        assert api.get("/readyz").json()["redis"] == "degraded"
    with database.read() as session:
        assert queries.job(session, job["id"]) is not None


def test_outputs_have_requested_logprobs_in_the_shape_of_the_endpoint(api: TestClient, database: Database) -> None:
    chat = submitted(api, "Hello", logprobs=True)
    answer_all(database, logprobs=([["Paris.", -0.5]],))
    text = submitted(api, "Hello", logprobs=0, endpoint=COMPLETIONS_ENDPOINT)
    answer_all(database, logprobs=([["Paris.", -0.5]],))
    of_chat, of_text = (api.get(f"/v1/jobs/{job['id']}/outputs").json()["choices"][0] for job in (chat, text))
    told = {"token": "Paris.", "logprob": -0.5, "bytes": list(b"Paris."), "top_logprobs": []}
    assert of_chat["logprobs"] == {"content": [told], "refusal": None}
    assert of_text["logprobs"] == {
        "tokens": ["Paris."],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"Paris.": -0.5}],
        "text_offset": [0],
    }


def test_outputs_name_what_fixed_their_bits_and_the_service_says_what_that_is(
    api: TestClient, database: Database
) -> None:
    job = submitted(api, "Hello")
    answer_all(database, numerics="fp_1")
    assert api.get(f"/v1/jobs/{job['id']}/outputs").json()["choices"][0]["numerics"] == "fp_1"
    missing = api.get("/v1/numerics/fp_1")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "fingerprint")
    with database.write() as session:
        for parts in ({"dtype": "bfloat16"}, {"dtype": "written twice"}):
            numerics.record(session, Numerics("fp_1", parts))
    found = api.get("/v1/numerics/fp_1").content
    assert NumericsReply.model_validate_json(found, strict=True).parts == {"dtype": "bfloat16"}


def test_outputs_come_in_the_order_of_the_job_with_errors_in_place_of_text(api: TestClient, database: Database) -> None:
    job = submitted(api, "one", {"custom_id": "bad", "prompt": "two", "temperature": -1}, "three")
    answer_all(database)
    reply = api.get(f"/v1/jobs/{job['id']}/outputs")
    assert reply.headers["content-type"] == "application/x-ndjson; charset=utf-8"
    first, bad, third = (json.loads(line) for line in reply.text.splitlines())
    assert [line["custom_id"] for line in (first, bad, third)] == ["request-0", "bad", "request-2"]
    assert first["choices"][0] | {"completion_tokens": 0} == {
        "index": 0,
        "text": "Paris.",
        "finish_reason": "stop",
        "completion_tokens": 0,
    }
    assert first["usage"]["total_tokens"] == first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert (bad["error"]["code"], bad["error"]["param"]) == ("invalid_value", "temperature")
    rest = api.get(f"/v1/jobs/{job['id']}/outputs?after=1").text.splitlines()
    assert [json.loads(line)["index"] for line in rest] == [2]


def test_a_finished_job_has_its_times_and_tokens(api: TestClient, database: Database) -> None:
    job_id = submitted(api)["id"]
    answer_all(database)
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert job["status"] == "completed"
    assert job["completed_at"] >= job["in_progress_at"] >= job["created_at"]
    assert job["failed_at"] is job["cancelled_at"] is None
    assert job["progress"]["completion_tokens"] > 0
    assert api.get(f"/v1/jobs/{job_id}").json() == job


def test_events_carry_the_text_and_end_with_the_job(api: TestClient, database: Database) -> None:
    job_id = submitted(api, "one", "")["id"]
    answer_all(database, text="a\ndata: b")
    reply = api.get(f"/v1/jobs/{job_id}/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
    assert [(event["type"], event.get("index")) for event in events] == [
        ("failed", 1),
        ("tokens", 0),
        ("finished", 0),
        ("job", None),
    ]
    assert events[1]["text"] == "a\ndata: b"
    assert events[-1]["status"] == "completed"


def test_a_client_resumes_after_its_last_event_id(api: TestClient, database: Database) -> None:
    path = f"/v1/jobs/{submitted(api, 'one', 'two')['id']}/events"
    answer_all(database)
    whole = blocks(api.get(path).text)
    for seen in range(len(whole)):
        reply = api.get(path, headers={"last-event-id": id_of(whole[seen])})
        if seen + 1 == len(whole):
            assert (reply.status_code, reply.text) == (204, "")
        else:
            assert blocks(reply.text) == whole[seen + 1 :]


@pytest.mark.parametrize("event_id", ["", "nonsense", "999999", "9" * 200, "1.2.3", "-1~completed", "0-999"])
def test_an_unknown_last_event_id_starts_from_the_beginning(api: TestClient, database: Database, event_id: str) -> None:
    path = f"/v1/jobs/{submitted(api)['id']}/events"
    answer_all(database)
    assert blocks(api.get(path, headers={"last-event-id": event_id}).text) == blocks(api.get(path).text)


def blocks(stream: str) -> list[str]:
    return [block for block in stream.split("\n\n") if "data: " in block]


def id_of(block: str) -> str:
    return block.partition("id: ")[2].partition("\n")[0]


def test_outputs_can_be_followed_in_the_order_in_which_requests_end(api: TestClient, database: Database) -> None:
    job_id = submitted(api, "one", "", "three")["id"]
    answer_all(database)
    lines = [json.loads(line) for line in api.get(f"/v1/jobs/{job_id}/outputs?follow=true").text.splitlines()]
    assert [line["index"] for line in lines] == [1, 0, 2]
    params = {"follow": "true", "cursor": lines[1]["cursor"]}
    rest = api.get(f"/v1/jobs/{job_id}/outputs", params=params).text.splitlines()
    assert [json.loads(line) for line in rest] == lines[2:]


@pytest.mark.parametrize("follow", ["true", "false"])
def test_failed_returns_only_failed_requests(api: TestClient, database: Database, follow: str) -> None:
    job_id = submitted(api, "one", "", "three")["id"]
    answer_all(database)
    lines = api.get(f"/v1/jobs/{job_id}/outputs", params={"failed": "true", "follow": follow}).text.splitlines()
    assert [json.loads(line)["index"] for line in lines] == [1]


def test_failed_requests_run_again_as_a_new_job(api: TestClient, database: Database, notified: Notified) -> None:
    job = submitted(api, "one", "", {"prompt": "three", "custom_id": "c", "seed": 7}, metadata={"team": "a"})
    api.post(f"/v1/jobs/{job['id']}/cancel")
    ended = api.get(f"/v1/jobs/{job['id']}").json()
    again = api.post(f"/v1/jobs/{job['id']}/retry").json()
    assert (again["retry_of"], again["metadata"]) == (job["id"], {"team": "a"})
    assert again["request_counts"] == {"total": 2, "completed": 0, "failed": 0}  # the empty prompt can't run
    assert notified.calls[-1] == (again["id"], "tiny")
    answer_all(database)
    lines = [json.loads(line) for line in api.get(f"/v1/jobs/{again['id']}/outputs").text.splitlines()]
    assert [line["custom_id"] for line in lines] == ["request-0", "c"]
    assert api.get(f"/v1/jobs/{job['id']}").json() == ended
    reply = api.post(f"/v1/jobs/{again['id']}/retry")
    assert (reply.status_code, reply.headers["x-should-retry"]) == (409, "false")


def test_a_retry_repeated_with_one_idempotency_key_is_one_job(api: TestClient) -> None:
    job_id = submitted(api)["id"]
    assert api.post(f"/v1/jobs/{job_id}/retry").status_code == 409
    api.post(f"/v1/jobs/{job_id}/cancel")
    key = {"idempotency-key": "k"}
    assert len({api.post(f"/v1/jobs/{job_id}/retry", headers=key).json()["id"] for _ in range(2)}) == 1


def test_time_left_is_estimated_from_the_completed_requests(api: TestClient, database: Database) -> None:
    job_id = submitted(api, "one", "two")["id"]
    assert api.get(f"/v1/jobs/{job_id}").json()["progress"]["time_left_s"] is None
    answer_all(database, limit=1)
    progress = api.get(f"/v1/jobs/{job_id}").json()["progress"]
    assert progress["time_left_s"] == pytest.approx(progress["elapsed_s"], abs=0.1)
    answer_all(database)
    assert api.get(f"/v1/jobs/{job_id}").json()["progress"]["time_left_s"] == 0


def test_racing_submissions_with_one_idempotency_key_are_one_job(api: TestClient, notified: Notified) -> None:
    def submit(_: int) -> str:
        reply = api.post("/v1/jobs", json={"prompts": ["Hello"]}, headers={"idempotency-key": "k"})
        return str(reply.json()["id"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(submit, range(16)))) == 1
    assert len(notified.calls) == 1


def test_the_same_idempotency_key_and_body_give_the_same_job(api: TestClient, notified: Notified) -> None:
    key = {"idempotency-key": "k"}
    first, again = (api.post("/v1/jobs", json={"prompts": ["Hello"]}, headers=key).json() for _ in range(2))
    assert first["id"] == again["id"]
    other = api.post("/v1/jobs", json={"prompts": ["Bye"]}, headers=key)
    assert other.status_code == 409
    assert other.headers["x-should-retry"] == "false"
    assert len(notified.calls) == 1


def test_cancelling_may_be_repeated_and_is_a_conflict_for_a_finished_job(api: TestClient, database: Database) -> None:
    job_id = submitted(api)["id"]
    assert {api.post(f"/v1/jobs/{job_id}/cancel").json()["status"] for _ in range(2)} == {"cancelled"}
    done = submitted(api)["id"]
    answer_all(database)
    reply = api.post(f"/v1/jobs/{done}/cancel")
    assert reply.status_code == 409
    assert reply.json()["error"]["message"] == "Cannot cancel a job with status 'completed'."


def test_jobs_are_listed_in_pages_newest_first(api: TestClient) -> None:
    ids = [submitted(api)["id"] for _ in range(5)]
    seen: list[str] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {"after": page["last_id"]} if page["last_id"] else {}
        page = api.get("/v1/jobs", params={"limit": 2} | after).json()
        seen += [job["id"] for job in page["data"]]
    assert seen == ids[::-1]


def test_a_caller_sees_and_cancels_only_its_own_jobs(api: TestClient, database: Database) -> None:
    alice, bob, admin = a_key(database), a_key(database), a_key(database, Scope.ADMIN)
    api.headers = alice
    hers = submitted(api)["id"]
    api.headers = bob
    his = submitted(api)["id"]
    assert [job["id"] for job in api.get("/v1/jobs").json()["data"]] == [his]
    assert api.get("/v1/jobs", params={"after": hers}).status_code == 400
    for path in ("", "/outputs", "/events", "/stats"):
        assert api.get(f"/v1/jobs/{hers}{path}").status_code == 404
    assert api.post(f"/v1/jobs/{hers}/cancel").status_code == 404
    api.headers = admin
    assert [job["id"] for job in api.get("/v1/jobs").json()["data"]] == [his, hers]
    assert api.get(f"/v1/jobs/{hers}").json()["status"] == "in_progress"


def test_statistics_exist_per_job_and_in_total(api: TestClient, database: Database) -> None:
    job_id = submitted(api)["id"]
    answer_all(database)
    for path in (f"/v1/jobs/{job_id}/stats", "/v1/stats"):
        assert api.get(path).json()["completion_tokens"] > 0


def test_compare_plain_works_in_the_query_too(api: TestClient) -> None:
    reply = api.post("/v1/jobs", params={"compare_plain": "2"}, content='"one"\n"two"\n', headers=LINES)
    assert api.get(f"/v1/jobs/{reply.json()['id']}/stats").json()["comparison"]["requests_asked"] == 2


def test_statistics_include_the_comparison_with_plain_decoding(api: TestClient, database: Database) -> None:
    job = submitted(api, "one", "two", "three", compare_plain=2)
    assert api.get(f"/v1/jobs/{submitted(api)['id']}/stats").json()["comparison"] is None
    waiting = api.get(f"/v1/jobs/{job['id']}/stats").json()["comparison"]
    assert (waiting["requests_asked"], waiting["done"], waiting["speedup"]) == (2, False, None)
    answer_all(database)
    rows = [SpeedupCheckResult(index, 3, 10.0, 20.0 + index, 2.0, same_text=index == 0) for index in range(2)]
    with database.write() as session:
        speedup_checks.save_check(session, "w", job["id"], rows)

    told = api.get(f"/v1/jobs/{job['id']}/stats").json()["comparison"]

    assert (told["requests"], told["done"], told["faults"]) == (2, True, 1)
    assert told["speedup"] == pytest.approx(2.05)
    assert told["speedup_error"] == pytest.approx(0.05)


def test_models_and_workers_are_listed(api: TestClient, database: Database) -> None:
    with database.write() as session:
        writes.register_worker(session, a_worker_card(target="org/large", context_tokens=64))
    assert [model["id"] for model in api.get("/v1/models").json()["data"]] == ["org/large", "tiny"]
    assert api.get("/v1/models/org%2Flarge").json()["context_tokens"] == 64
    assert api.get("/v1/models/org/large").json()["id"] == "org/large"
    assert api.get("/v1/workers").json()["data"][0]["target"] == "org/large"


BAD_SUBMISSIONS: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"content": "{", "headers": {"content-type": "application/json"}}, 400, "invalid_value", None),
    ({"content": "é".encode("latin-1"), "headers": {"content-type": "application/json"}}, 400, "invalid_value", None),
    ({"content": "[" * 9000, "headers": {"content-type": "application/json"}}, 400, "invalid_value", None),
    ({"json": []}, 400, "invalid_value", None),
    ({"json": {}}, 400, "missing_required_parameter", "requests"),
    ({"json": {"requests": []}}, 400, "empty_job", None),
    ({"json": {"requests": "Hello"}}, 400, "invalid_value", "requests"),
    ({"json": {"requests": ["a"], "prompts": ["b"]}}, 400, "missing_required_parameter", "requests"),
    ({"json": {"requests": ["a"], "max_tokens": 0}}, 400, "invalid_value", "max_tokens"),
    ({"json": {"requests": ["a"], "max_token": 5}}, 400, "unknown_parameter", "max_token"),
    ({"json": {"requests": ["a"], "tools": [{}]}}, 400, "missing_required_parameter", "tools[0].function"),
    ({"json": {"requests": ["a"], "parameters": 7}}, 400, "invalid_value", "parameters"),
    ({"json": {"requests": ["a"], "parameters": {"x": 1}}}, 400, "unknown_parameter", "parameters.x"),
    ({"json": {"requests": ["a"], "model": 7}}, 400, "invalid_value", "model"),
    ({"json": {"requests": ["a"], "model": "gpt-9"}}, 404, "model_not_found", "model"),
    ({"json": {"requests": ["a"], "endpoint": "/v1/embeddings"}}, 400, "invalid_value", "endpoint"),
    ({"json": {"requests": ["a"], "endpoint": {}}}, 400, "invalid_value", "endpoint"),
    ({"json": {"requests": ["a"], "completion_window": "soon"}}, 400, "invalid_value", "completion_window"),
    ({"json": {"requests": ["a"], "metadata": {"a": 1}}}, 400, "invalid_value", "metadata"),
    ({"json": {"requests": ["a"], "compare_plain": 0}}, 400, "invalid_value", "compare_plain"),
    ({"json": {"requests": ["a"], "compare_plain": 101}}, 400, "invalid_value", "compare_plain"),
    ({"json": {"requests": ["a"], "compare_plain": True}}, 400, "invalid_value", "compare_plain"),
    ({"json": {"requests": ["a"], "compare_plain": "2"}}, 400, "invalid_value", "compare_plain"),
    ({"json": {"requests": ["a"], "compare_plain": 2.5}}, 400, "invalid_value", "compare_plain"),
    ({"json": {"requests": ["a"] * 6}}, 400, "too_many_requests", None),
    ({"json": {"requests": ["x" * 10_001]}}, 413, "file_too_large", None),
    ({"content": "", "headers": LINES}, 400, "empty_job", None),
    ({"content": '"a"', "headers": LINES, "params": {"requests": "1"}}, 400, "unknown_parameter", "requests"),
    ({"content": "a=b", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 415, None, None),
    ({"content": "{}", "headers": {"content-type": "application/json", "content-encoding": "br"}}, 415, None, None),
    ({"json": {"requests": ["a"]}, "headers": {"idempotency-key": "k" * 256}}, 400, "invalid_value", "Idempotency-Key"),
]


@pytest.mark.parametrize(("call", "status", "code", "param"), BAD_SUBMISSIONS)
def test_an_invalid_submission_gets_the_error_object(
    api: TestClient, notified: Notified, call: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    reply = api.post("/v1/jobs", **call)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert len(reply.text) < 500
    assert notified.calls == []


def test_a_chunked_body_has_the_same_limit(api: TestClient) -> None:
    parts = iter([b'{"requests": ["', *[b"x" * 1000] * 20])
    reply = api.post("/v1/jobs", content=parts, headers={"content-type": "application/json"})
    assert reply.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/jobs/batch_unknown", 404),
        ("GET", "/v1/jobs/%00%FF';--", 404),
        ("GET", "/v1/jobs/" + "x" * 500, 404),
        ("GET", "/v1/jobs/batch_unknown/outputs", 404),
        ("GET", "/v1/jobs/batch_unknown/events", 404),
        ("GET", "/v1/jobs/batch_unknown/stats", 404),
        ("POST", "/v1/jobs/batch_unknown/cancel", 404),
        ("GET", "/v1/models/gpt-9", 404),
        ("DELETE", "/v1/jobs", 405),
        ("GET", "/v1/jobs?limit=0", 400),
        ("GET", "/v1/jobs?id_prefix=%00", 400),
        ("GET", "/v1/jobs?limit=true", 400),
        ("GET", "/v1/jobs?after=batch_unknown", 400),
    ],
)
def test_every_error_has_the_error_object_and_a_request_id(
    api: TestClient, method: str, path: str, status: int
) -> None:
    reply = api.request(method, path)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"].startswith("req_")


def test_an_unavailable_database_is_a_503_with_retry_after(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    for name in ("jobs", "job", "models"):
        monkeypatch.setattr(queries, name, fail)
    for reply in (api.get("/v1/jobs"), api.get("/readyz"), api.post("/v1/jobs", json={"requests": ["a"]})):
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "server_error"
        assert int(reply.headers["retry-after"]) > 0
    assert api.get("/healthz").status_code == 200


def test_an_unexpected_exception_is_a_500_without_a_traceback(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(queries, "jobs", fail)
    reply = api.get("/v1/jobs")
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"].startswith("req_")


def stored_bodies(database: Database, job_id: str) -> list[Any]:
    with database.read() as session:
        rows = session.scalars(select(Request.body).where(Request.job_id == job_id).order_by(Request.request_index))
        return [body for body in rows if body is not None]


def test_the_first_line_of_a_job_may_hold_its_parameters(api: TestClient, database: Database) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    lines = [{"parameters": {"response_format": schema, "max_tokens": 3}}, "a", {"prompt": "b", "regex": "b+"}, "{"]
    content = "".join(json.dumps(line) + "\n" for line in lines[:3]) + "{\n"
    reply = api.post("/v1/jobs?temperature=0", content=content, headers=LINES)
    assert reply.status_code == 200, reply.text
    bodies = stored_bodies(database, reply.json()["id"])
    assert [body["grammar"]["kind"] for body in bodies] == ["json_schema", "regex"]
    assert [(body["sampling"]["max_tokens"], body["sampling"]["temperature"]) for body in bodies] == [(3, 0.0)] * 2
    failed = api.get(f"/v1/jobs/{reply.json()['id']}/outputs?failed=true").json()
    assert (failed["index"], failed["custom_id"]) == (2, "request-2")
    assert failed["error"]["message"].startswith("line 4")
    twice = api.post('/v1/jobs?parameters={"n":1}', content=content, headers=LINES)
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "parameters")


def test_a_bad_schema_of_a_job_refuses_it_and_that_of_a_line_its_line(api: TestClient) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    refused = api.post("/v1/jobs", json={"requests": ["a"], "response_format": bad})
    place = "response_format.json_schema.schema.uniqueItems"
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, place)
    job = submitted(api, "a", {"prompt": "b", "response_format": bad})
    assert job["request_counts"] == {"total": 2, "completed": 0, "failed": 1}
    failed = api.get(f"/v1/jobs/{job['id']}/outputs?failed=true").json()
    assert (failed["index"], failed["error"]["param"]) == (1, place)
