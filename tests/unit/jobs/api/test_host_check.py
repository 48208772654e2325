"""By which names the service may be called, and what a page of another site may do with it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import h11
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from jobs.api.app import make_api
from jobs.api.http.h11_protocol import ConflictingLengths, StrictConnection
from jobs.api.http.host_check import ServedNames
from jobs.settings import JobsSettings
from storage.session import Database
from tests.factories import a_key

HOME = {"host": "127.0.0.1:8000"}
A_JOB = {"requests": ["Hello"], "max_tokens": 10}
EVIL = "http://evil.example"


def a_client(settings: JobsSettings, database: Database, **fields: Any) -> TestClient:
    names = ServedNames.of(settings.model_copy(update=fields))
    api = make_api(settings, database, lambda job_id, model: None, served_names=names)

    @api.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    return TestClient(api, raise_server_exceptions=False)


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    with a_client(settings, database) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models", "/metrics", "/readyz", "/healthz", "/openapi.json", "/"])
def test_a_name_that_was_bound_to_our_address_reads_nothing(api: TestClient, path: str) -> None:
    reply = api.get(path, headers={"host": "rebound.example:8000"})
    assert reply.status_code == 421
    assert reply.json()["error"]["code"] == "host_not_served"
    assert "'rebound.example:8000'" in reply.json()["error"]["message"]
    assert "BASIC_API_NAMES" in reply.json()["error"]["message"]
    assert reply.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:8000", "127.0.0.2:1", "localhost", "LOCALHOST:8000", "localhost."),
        *("[::1]:8000", "[::1]", "[::ffff:127.0.0.1]"),
    ],
)
def test_a_service_on_loopback_answers_to_the_names_of_loopback(api: TestClient, host: str) -> None:
    assert api.get("/v1/jobs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("10.0.0.1", "192.0.2.7:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example@127.0.0.1"),
        *("127.0.0.1@evil.example", "0.0.0.0:8000", ":8000", "[::2]:8000", "[127.0.0.1", "localhost:8000:1", "a b"),
    ],
)
def test_it_answers_to_nothing_that_only_looks_like_them(api: TestClient, host: str) -> None:
    assert api.get("/v1/jobs", headers={"host": host}).status_code == 421


def test_a_service_on_every_address_answers_to_addresses_and_the_name_of_its_machine_but_to_no_other_name(
    settings: JobsSettings, database: Database
) -> None:
    with a_client(settings, database, api_host="0.0.0.0") as api:
        for host in ("192.0.2.7:8000", "[fd00::7]:8000", "127.0.0.1", "localhost:8000", socket.gethostname()):
            assert api.get("/healthz", headers={"host": host}).status_code == 200, host
        assert api.get("/healthz", headers={"host": "evil.example"}).status_code == 421


def test_a_service_on_one_address_answers_to_that_one(settings: JobsSettings, database: Database) -> None:
    with a_client(settings, database, api_host="192.0.2.7") as api:
        assert api.get("/healthz", headers={"host": "192.0.2.7:8000"}).status_code == 200
        assert api.get("/healthz", headers={"host": "192.0.2.8:8000"}).status_code == 421


@pytest.mark.parametrize(
    ("names", "host", "status"),
    [
        ("basic.example.com", "basic.example.com", 200),
        ("Basic.Example.com , other", "basic.example.com:443", 200),
        ("basic.example.com:8443", "basic.example.com:8443", 200),
        ("basic.example.com", "www.basic.example.com", 421),
        ("*.example.com", "basic.example.com", 200),
        ("*.example.com", "example.com", 421),
        ("*.example.com", "evilexample.com", 421),
        ("[fd00::7]:8000", "[fd00::7]:8000", 200),
        ("fd00::7", "[fd00::7]:8000", 200),
        ("*", "anything.example", 200),
    ],
)
def test_a_name_of_the_setting_is_answered_to(
    settings: JobsSettings, database: Database, names: str, host: str, status: int
) -> None:
    JobsSettings(api_names=names)  # is taken
    with a_client(settings, database, api_names=names) as api:
        assert api.get("/healthz", headers={"host": host}).status_code == status


@pytest.mark.parametrize("names", ["https://basic.example.com", "basic.example.com/path", "a b", "a;b", "ex*mple.com"])
def test_a_name_that_is_none_is_refused_with_how_to_write_one(names: str) -> None:
    with pytest.raises(ValidationError, match="is not a host name; write names such as"):
        JobsSettings(api_names=names)


FROM_ELSEWHERE = [
    {"origin": EVIL},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:3000"},
    {"origin": "http://localhost:8000"},
    {"origin": "https://127.0.0.1.evil.example:8000"},
    {"origin": "file://"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "none", "origin": EVIL},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    {"sec-fetch-site": "cross-site", "authorization": "Basic YTpi"},
    {"origin": EVIL, "authorization": "Bearer "},
]


@pytest.mark.parametrize("headers", FROM_ELSEWHERE)
def test_a_page_of_another_site_can_do_nothing_without_a_key(api: TestClient, headers: dict[str, str]) -> None:
    form = {"files": {"file": ("a.jsonl", b"{}\n"), "purpose": (None, "batch")}}
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/v1/jobs", {}),
        ("POST", "/v1/jobs", {"json": A_JOB}),
        ("POST", "/v1/jobs/x/cancel", {}),
        ("POST", "/v1/jobs/x/retry", {}),
        ("POST", "/v1/files", form),
        ("POST", "/v1/batches", {"content": b"{}", "headers": {"content-type": "text/plain"}}),
        ("POST", "/v1/chat/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}),
        ("DELETE", "/v1/files/x", {}),
        ("OPTIONS", "/v1/jobs", {}),
        ("GET", "/metrics", {}),
    ]
    for method, path, body in calls:
        sent = {**body, "headers": HOME | headers | body.get("headers", {})}
        reply = api.request(method, path, **sent)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "cross_site_refused"), (method, path)
        assert "BASIC_API_NAMES" in reply.json()["error"]["message"]
    assert api.get("/v1/jobs", headers=HOME).json()["data"] == []
    assert api.get("/v1/files", headers=HOME).json()["data"] == []


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/batches", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "application/x"],
)
def test_json_is_taken_as_json_only(api: TestClient, path: str, kind: str | None) -> None:
    reply = api.post(
        path, content=b'{"model": "tiny"}', headers=HOME | ({} if kind is None else {"content-type": kind})
    )
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]
    as_json = api.post(path, content=b"[]", headers=HOME | {"content-type": "Application/JSON; charset=utf-8"})
    assert as_json.status_code == 400


def test_a_head_that_says_twice_how_long_its_body_is_is_refused() -> None:
    for lengths in (
        b"content-length: 5\r\ntransfer-encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 0",
    ):
        connection = StrictConnection(h11.SERVER)
        connection.receive_data(b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\n" + lengths + b"\r\n\r\n")
        with pytest.raises(ConflictingLengths, match="not both"):
            connection.next_event()


def test_a_page_of_another_site_gets_no_socket(api: TestClient) -> None:
    for refused in ({"origin": EVIL} | HOME, {"host": "rebound.example", "origin": "http://rebound.example"}):
        with pytest.raises(WebSocketDisconnect), api.websocket_connect("/socket", headers=refused):
            pass
    with api.websocket_connect("/socket", headers=HOME | {"origin": "http://127.0.0.1:8000"}):
        pass


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:8000"},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"},
        {"sec-fetch-site": "same-origin", "origin": "https://basic.example.com"},  # a proxy that gives its own Host
        {"sec-fetch-site": "none"},
        {"authorization": "Bearer sk-something"},  # the openai client
    ],
)
def test_programs_and_the_service_s_own_pages_come_in(api: TestClient, headers: dict[str, str]) -> None:
    assert api.post("/v1/jobs", json=A_JOB, headers=HOME | headers).status_code == 200


def test_a_page_with_a_key_comes_in_from_wherever_it_is(api: TestClient, database: Database) -> None:
    key = a_key(database)
    assert api.post("/v1/jobs", json=A_JOB, headers=HOME | key | {"origin": EVIL}).status_code == 200


def test_a_link_on_another_site_may_be_followed(api: TestClient) -> None:
    visit = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert api.get("/v1/jobs", headers=HOME | visit).status_code == 200
    assert api.post("/v1/jobs", headers=HOME | visit).status_code == 403


def test_behind_a_proxy_that_gives_its_own_host_pages_of_a_named_host_are_the_service_s_own(
    settings: JobsSettings, database: Database
) -> None:
    with a_client(settings, database, api_names="basic.example.com,other.example.com:8443") as api:
        for origin, status in (
            ("https://basic.example.com", 200),
            ("https://other.example.com:8443", 200),
            ("https://basic.example.com:9000", 403),
        ):
            assert api.get("/v1/jobs", headers=HOME | {"origin": origin}).status_code == status
