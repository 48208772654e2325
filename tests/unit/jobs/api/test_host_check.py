"""Host checks and cross-site requests."""

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
from tests.api_client import ApiClient
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

    return ApiClient(api, raise_server_exceptions=False)


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    with a_client(settings, database) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/models", "/metrics", "/readyz", "/healthz", "/openapi.json", "/"])
def test_a_rebound_host_name_is_rejected(api: TestClient, path: str) -> None:
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
def test_on_loopback_the_loopback_names_are_accepted(api: TestClient, host: str) -> None:
    assert api.get("/v1/jobs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("10.0.0.1", "192.0.2.7:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example@127.0.0.1"),
        *("127.0.0.1@evil.example", "0.0.0.0:8000", ":8000", "[::2]:8000", "[127.0.0.1", "localhost:8000:1", "a b"),
    ],
)
def test_similar_host_names_are_rejected(api: TestClient, host: str) -> None:
    assert api.get("/v1/jobs", headers={"host": host}).status_code == 421


def test_on_all_addresses_any_ip_address_and_the_hostname_are_accepted_and_no_other_name(
    settings: JobsSettings, database: Database
) -> None:
    with a_client(settings, database, api_host="0.0.0.0") as api:
        for host in ("192.0.2.7:8000", "[fd00::7]:8000", "127.0.0.1", "localhost:8000", socket.gethostname()):
            assert api.get("/healthz", headers={"host": host}).status_code == 200, host
        assert api.get("/healthz", headers={"host": "evil.example"}).status_code == 421


def test_on_one_address_that_address_is_accepted(settings: JobsSettings, database: Database) -> None:
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
def test_a_configured_name_is_accepted(
    settings: JobsSettings, database: Database, names: str, host: str, status: int
) -> None:
    JobsSettings(api_names=names)  # is taken
    with a_client(settings, database, api_names=names) as api:
        assert api.get("/healthz", headers={"host": host}).status_code == status


@pytest.mark.parametrize("names", ["https://basic.example.com", "basic.example.com/path", "a b", "a;b", "ex*mple.com"])
def test_a_malformed_name_is_rejected_with_a_hint(names: str) -> None:
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
def test_cross_site_requests_without_a_key_are_rejected(api: TestClient, headers: dict[str, str]) -> None:
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
def test_json_needs_the_json_content_type(api: TestClient, path: str, kind: str | None) -> None:
    reply = api.post(
        path, content=b'{"model": "tiny"}', headers=HOME | ({} if kind is None else {"content-type": kind})
    )
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]
    as_json = api.post(path, content=b"[]", headers=HOME | {"content-type": "Application/JSON; charset=utf-8"})
    assert as_json.status_code == 400


def test_content_length_with_transfer_encoding_is_rejected() -> None:
    for lengths in (
        b"content-length: 5\r\ntransfer-encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 0",
    ):
        connection = StrictConnection(h11.SERVER)
        connection.receive_data(b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\n" + lengths + b"\r\n\r\n")
        with pytest.raises(ConflictingLengths, match="not both"):
            connection.next_event()


def test_cross_site_websockets_are_rejected(api: TestClient) -> None:
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
        {"sec-fetch-site": "same-origin", "origin": "https://basic.example.com"},  # a proxy that sends its own Host
        {"sec-fetch-site": "none"},
        {"authorization": "Bearer sk-something"},  # the openai client
    ],
)
def test_programs_and_same_origin_pages_are_accepted(api: TestClient, headers: dict[str, str]) -> None:
    assert api.post("/v1/jobs", json=A_JOB, headers=HOME | headers).status_code == 200


def test_cross_site_requests_with_a_key_are_accepted(api: TestClient, database: Database) -> None:
    key = a_key(database)
    assert api.post("/v1/jobs", json=A_JOB, headers=HOME | key | {"origin": EVIL}).status_code == 200


def test_cross_site_navigation_is_accepted(api: TestClient) -> None:
    visit = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert api.get("/v1/jobs", headers=HOME | visit).status_code == 200
    assert api.post("/v1/jobs", headers=HOME | visit).status_code == 403


def test_behind_a_proxy_that_changes_host_pages_of_a_configured_origin_are_same_site(
    settings: JobsSettings, database: Database
) -> None:
    with a_client(settings, database, api_names="basic.example.com,other.example.com:8443") as api:
        for origin, status in (
            ("https://basic.example.com", 200),
            ("https://other.example.com:8443", 200),
            ("https://basic.example.com:9000", 403),
        ):
            assert api.get("/v1/jobs", headers=HOME | {"origin": origin}).status_code == status
