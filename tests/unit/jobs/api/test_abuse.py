"""Invalid input: the answer is a 4xx with an error object, never a 5xx, a traceback or an echo of the whole body."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from jobs.api.app import make_api
from jobs.messages import CHAT_ENDPOINT
from jobs.settings import JobsSettings
from storage import writes
from storage.session import Database
from tests.api_client import ApiClient
from tests.databases import on_sqlite
from tests.factories import a_worker_card

JSON = {"content-type": "application/json"}
LINES = {"content-type": "application/x-ndjson"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service for all cases: a case that counts jobs needs `own_api`."""
    folder = tmp_path_factory.mktemp("abuse")
    settings = JobsSettings(data_dir=folder, redis_url="redis://127.0.0.1:1/0", target="tiny", max_requests=5)
    with on_sqlite(folder) as database:
        yield from serve(settings, database)


@pytest.fixture
def own_api(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    yield from serve(settings, database)


def serve(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    with database.write() as session:
        writes.register_worker(session, a_worker_card(target="tiny", context_tokens=100))
    wide = settings.model_copy(update={"max_body_bytes": 1_000_000, "max_json_bytes": 500_000})
    with ApiClient(make_api(wide, database, lambda job_id, model: None), raise_server_exceptions=False) as client:
        yield client


def refused(reply: Any, status: int = 400) -> dict[str, Any]:
    assert reply.status_code == status, reply.text[:300]
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(reply.content) < 600, "no echo of the body"
    return error


# Invalid fields of one prompt, for both completion routes.
NO_JSON = {
    "truncated": b'"Hello',
    "latin-1": '"Stra\xdfe"'.encode("latin-1"),
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deeper objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "long integer": b"9" * 5_000,
    "lone surrogate": b'"\\ud800"',
    "bad escape": b'"\\x"',
    "UTF-16": '"Hello"'.encode("utf-16"),
    "two values": b'"a" "b"',
    "raw NUL": b'"a\x00b"',
}


@pytest.mark.parametrize("value", NO_JSON.values(), ids=NO_JSON.keys())
def test_invalid_json_is_rejected_as_a_whole_or_per_line(api: TestClient, value: bytes) -> None:
    refused(api.post("/v1/jobs", content=b'{"requests": [' + value + b"]}", headers=JSON))
    refused(api.post(CHAT_ENDPOINT, content=b'{"model": "tiny", "messages": ' + value + b"}", headers=JSON))
    job = api.post("/v1/jobs", content=b'"one"\n' + value.replace(b"\n", b" ") + b'\n"three"', headers=LINES).json()
    assert job["request_counts"] == {"total": 3, "completed": 0, "failed": 1}


BAD_VALUES: list[tuple[str, Any]] = [
    ("prompt", "\0"),
    ("prompt", " \n\t "),
    ("prompt", ""),
    ("prompt", 5),
    ("prompt", {"a": 1}),
    ("custom_id", "a\0"),
    ("custom_id", ""),
    ("custom_id", "x" * 65),
    ("custom_id", 7.5),
    ("model", "../../etc/passwd"),
    ("model", "http://169.254.169.254/"),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", True),
    ("max_tokens", "7"),
    ("max_tokens", 1.5),
    ("n", 0),
    ("n", 10**6),
    ("temperature", -1),
    ("temperature", 1e308),
    ("temperature", "0"),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("min_p", 2),
    ("seed", 2**64),
    ("seed", 0.5),
    ("stop", ["x"] * 10_000),
    ("stop", [""]),
    ("stop", "x" * 2_000),
    ("stop", ["a\0"]),
    ("stop_token_ids", [2**40]),
    ("stop_token_ids", list(range(10_000))),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1": 1e300}),
    ("logit_bias", {str(i): 1 for i in range(5_000)}),
    ("presence_penalty", 3),
    ("max_token", 5),
    ("", 5),
    ("__proto__", {}),
    ("x" * 10_000, 5),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=[f"{n[:20]}-{i}" for i, (n, _) in enumerate(BAD_VALUES)])
def test_a_bad_value_fails_its_request_alone_and_names_the_field(api: TestClient, name: str, value: Any) -> None:
    bad = {"prompt": "Hello", "custom_id": "bad", name: value}
    job = api.post("/v1/jobs", json={"model": "tiny", "requests": ["one", bad, "three"]}).json()
    assert job["request_counts"] == {"total": 3, "completed": 0, "failed": 1}
    (line,) = api.get(f"/v1/jobs/{job['id']}/outputs").text.splitlines()
    error = json.loads(line)["error"]
    assert name[:64] in error["param"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(("name", "value"), [pair for pair in BAD_VALUES if pair[0] not in ("prompt", "custom_id")])
def test_a_bad_value_in_a_call_is_a_400_or_a_404(api: TestClient, name: str, value: Any) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], name: value}
    refused(api.post(CHAT_ENDPOINT, json=body), 404 if name == "model" else 400)


def test_a_number_beyond_float_range_is_invalid(api: TestClient) -> None:
    reply = api.post("/v1/jobs", content=b'{"requests": ["a"], "temperature": 1e999}', headers=JSON)
    assert refused(reply)["code"] == "invalid_value"


BAD_MESSAGES: list[Any] = [
    "Hello",
    {},
    [[]],
    [{"role": "user"}],
    [{"role": "root", "content": "x"}],
    [{"role": "user", "content": "a\0"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
    [{"role": "user", "content": "x", "tool_calls": 1}],
    [{"role": ["user"], "content": "x"}],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES)
def test_invalid_messages_are_rejected_naming_their_index(api: TestClient, messages: Any) -> None:
    error = refused(api.post(CHAT_ENDPOINT, json={"model": "tiny", "messages": messages}))
    assert str(error["param"]).startswith("messages")


def test_the_last_of_duplicate_json_names_counts_and_a_byte_order_mark_is_ignored(api: TestClient) -> None:
    body = b'\xef\xbb\xbf{"requests": ["a"], "metadata": {"k": "1"}, "metadata": {"k": "2"}}'
    assert api.post("/v1/jobs", content=body, headers=JSON).json()["metadata"] == {"k": "2"}


@pytest.mark.parametrize(
    "metadata", [{"k": "\0"}, {"k" * 65: "v"}, {"k": "v" * 513}, {str(i): "" for i in range(17)}, [], "x"]
)
def test_metadata_has_openai_s_limits(api: TestClient, metadata: Any) -> None:
    assert refused(api.post("/v1/jobs", json={"requests": ["a"], "metadata": metadata}))["param"] == "metadata"


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "-1"},
        {"limit": "0"},
        {"limit": "1e3"},
        {"limit": str(10**30)},
        {"limit": "1; DROP TABLE jobs"},
        {"after": "' OR 1=1 --"},
        {"after": "%"},
        {"after": "a\0b"},
        {"after": "x" * 5_000},
    ],
)
def test_page_sizes_outside_the_bounds_are_rejected(own_api: TestClient, query: dict[str, str]) -> None:
    own_api.post("/v1/jobs", json={"requests": ["a"]})
    refused(own_api.get("/v1/jobs", params=query))
    assert len(own_api.get("/v1/jobs").json()["data"]) == 1


@pytest.mark.parametrize(
    "id_", ["%00", "..%2f..%2fetc%2fpasswd", "'%20OR%201=1", "%25", "%F0%28", "x" * 3_000, "%0d%0aX:%201"]
)
@pytest.mark.parametrize("path", ["/v1/jobs/{}", "/v1/jobs/{}/outputs", "/v1/jobs/{}/events", "/v1/models/{}"])
def test_a_malformed_id_is_not_found(api: TestClient, path: str, id_: str) -> None:
    refused(api.get(path.format(id_)), 404)


@pytest.mark.parametrize("after", ["-2", str(2**31), "x", "1.5"])
def test_after_must_be_a_valid_index(api: TestClient, after: str) -> None:
    job = api.post("/v1/jobs", json={"requests": ["a"]}).json()
    refused(api.get(f"/v1/jobs/{job['id']}/outputs", params={"after": after}))


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PATCH", "PUT", "DELETE", "BREW"])
def test_other_methods_are_not_allowed_and_no_cors_header_is_sent(api: TestClient, method: str) -> None:
    asked = api.request(method, "/v1/jobs")
    assert asked.status_code == 405
    assert asked.headers["allow"]
    foreign = {"origin": "https://example.org", "access-control-request-method": "POST"}
    preflight = api.request(method, "/v1/jobs", headers=foreign)
    assert preflight.status_code == 403, "a page of another site learns nothing, not even what is allowed"
    for reply in (asked, preflight):
        assert not [name for name in reply.headers if name.startswith("access-control")]
        if method != "HEAD":
            refused(reply, reply.status_code)


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "multipart/form-data", "", "application/json2"])
def test_bodies_of_other_content_types_are_rejected(api: TestClient, kind: str) -> None:
    refused(api.post("/v1/jobs", content=b'{"requests": ["a"]}', headers={"content-type": kind}), 415)


@pytest.mark.parametrize(
    ("encoding", "status"), [("gzip", 400), ("GZIP", 400), ("br", 415), ("deflate", 415), ("gzip, identity", 415)]
)
def test_damaged_gzip_bodies_and_other_encodings_are_rejected(api: TestClient, encoding: str, status: int) -> None:
    for path in ("/v1/jobs", CHAT_ENDPOINT):
        body = b"\x1f\x8b" + b"0" * 100
        refused(api.post(path, content=body, headers=JSON | {"content-encoding": encoding}), status)


def test_a_gzip_bomb_is_refused_and_a_gzip_body_is_read(api: TestClient) -> None:
    packed = {"content-encoding": "gzip"}
    bomb = gzip.compress(b'"' + b"x" * 30_000_000 + b'"')
    for headers in (JSON, LINES):
        refused(api.post("/v1/jobs", content=bomb, headers=headers | packed), 413)
        body = b'{"requests": ["a"]}' if headers is JSON else b'"a"'
        assert api.post("/v1/jobs", content=gzip.compress(body), headers=headers | packed).status_code == 200


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (gzip.compress(b'{"requests": ["a"]}'), "gzip"),
        ('{"requests": ["a"]}'.encode("utf-16"), "UTF-16"),
        (b"PAR1\x15\x04", "Parquet"),
        (b'["a", "b"]', "not a list. A job takes its requests as the field `requests`"),
    ],
    ids=["gzip", "UTF-16", "Parquet", "a list"],  # a gzip body holds its time: processes of pytest-xdist must agree
)
def test_a_json_body_of_another_format_is_named(api: TestClient, body: bytes, what: str) -> None:
    for path in ("/v1/jobs", CHAT_ENDPOINT):
        assert what in refused(api.post(path, content=body, headers=JSON))["message"]


def test_a_json_body_has_a_limit_of_its_own_and_lines_may_have_more(api: TestClient) -> None:
    long = "x" * 200_000
    assert refused(api.post("/v1/jobs", json={"requests": [long] * 3}), 413)["code"] == "file_too_large"
    assert api.post("/v1/jobs", content="\n".join([json.dumps(long)] * 3), headers=LINES).status_code == 200


def test_very_many_query_parameters_are_rejected(api: TestClient) -> None:
    many = "&".join(f"p{i}=1" for i in range(5_000))
    assert api.get(f"/v1/jobs?{many}").status_code == 200
    refused(api.post(f"/v1/jobs?{many}", content=b'"a"', headers=LINES))


@pytest.mark.parametrize("path", ["/redoc", "/docs/other", "/v1/", "//v1/jobs", "/V1/jobs", "/v1/keys", "/.env"])
def test_unknown_routes_are_not_found(api: TestClient, path: str) -> None:
    refused(api.get(path), 404)


def test_no_response_reveals_the_server_software(api: TestClient) -> None:
    assert "server" not in api.get("/healthz").headers
