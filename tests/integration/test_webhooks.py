"""Webhooks over real connections: what is sent, what is not waited for, and that kill -9 loses no event."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import text

from jobs.settings import JobsSettings
from jobs.webhooks.addresses import AddressRules
from jobs.webhooks.request import WebhookEvent, send
from jobs.webhooks.sender import WebhookSender
from jobs.webhooks.signature import new_secret
from storage import schema, webhooks
from storage.session import Database
from storage.webhooks import EVENT_TYPES, Attempt, EndpointView, NewEndpoint
from tests.databases import open_sqlite
from tests.receiver import Answer, Receiver, a_receiver, status
from tests.unit.storage.acts import cancel, record

LOOPBACK = AddressRules.of("127.0.0.0/8")
SECRET = new_secret()
PATIENCE_S = 300.0  # ends what hangs


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with a_receiver() as receiver:
        yield receiver


@pytest.fixture
def openai() -> OpenAI:
    return OpenAI(api_key="unused")


def endpoint(url: str) -> EndpointView:
    return EndpointView("wh_1", "", "", url, EVENT_TYPES, None, False, SECRET, None, None, 0.0, 0.0)


def sent(url: str, rules: AddressRules = LOOPBACK, timeout_s: float = 60.0) -> Attempt:
    event = WebhookEvent("evt_1", "batch.completed", "batch_1", 1_700_000_000.0)
    return send(event, endpoint(url), rules, time.time(), timeout_s)


def held_until(event: threading.Event) -> Answer:
    """Answer nothing until something has happened."""

    def hold(_: BaseHTTPRequestHandler) -> None:
        event.wait(PATIENCE_S)

    return hold


def test_a_receiver_with_the_openai_client_verifies_and_reads_what_arrives(receiver: Receiver, openai: OpenAI) -> None:
    assert sent(receiver.url) == Attempt(200, None, delivered=True)
    ((headers, body),) = receiver.received
    event = openai.webhooks.unwrap(body, headers, secret=SECRET)
    assert (event.type, json.loads(body)["data"]["id"]) == ("batch.completed", "batch_1")
    assert headers["webhook-id"] == "evt_1"
    assert headers["host"] == receiver.url.split("/")[2]


def test_an_answer_other_than_success_is_a_failure_with_one_line_and_redirects_are_not_followed(
    receiver: Receiver,
) -> None:
    receiver.answer = status(500, b"<h1>Oops\x1b[2J</h1>\nsecond line" + b"x" * 10_000_000)
    assert sent(receiver.url) == Attempt(500, "<h1>Oops [2J</h1>", delivered=False)
    receiver.answer = status(307, location=receiver.url)
    redirected = sent(receiver.url)
    assert (redirected.status_code, redirected.delivered) == (307, False)
    assert len(receiver.received) == 2
    receiver.answer = status(410)
    assert sent(receiver.url).final


def test_an_endpoint_that_hangs_or_drips_is_left_at_the_deadline(receiver: Receiver) -> None:
    ended = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        while not ended.wait(0.02):
            handler.wfile.write(b"H")

    for answer in (held_until(ended), drip):
        receiver.answer = answer
        attempt = sent(receiver.url, timeout_s=0.3)
        assert (attempt.status_code, attempt.delivered) == (None, False)
        assert attempt.error is not None
    ended.set()


def test_a_name_that_moves_to_a_private_address_after_its_check_is_not_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = iter(["203.0.114.1", "127.0.0.1"])

    def resolved(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(addresses), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    url = receiver.url.replace("http://127.0.0.1", "https://rebinding.example")
    AddressRules().check_url(url)
    attempt = sent(url, AddressRules())
    assert "127.0.0.1 is not a public address" in (attempt.error or "")
    assert receiver.received == []


def test_two_senders_share_the_outbox_and_each_event_arrives_once_also_after_failures(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.webhooks.sender.retry_pause_s", lambda age_s: 0.0)
    settings = JobsSettings(data_dir=tmp_path, webhook_networks="127.0.0.0/8", webhook_timeout_s=300)
    database = open_sqlite(tmp_path / "basic.sqlite3")
    with database.write() as session:
        webhooks.add_endpoint(session, NewEndpoint("wh_1", "", "", receiver.url, EVENT_TYPES, SECRET))
    refused: set[str] = set()

    def refuse_once(handler: BaseHTTPRequestHandler) -> None:
        event = str(handler.headers["webhook-id"])
        first = event not in refused
        refused.add(event)
        status(503 if first else 200)(handler)

    receiver.answer = refuse_once
    for number in range(12):
        record(database, f"job-{number}")
        cancel(database, f"job-{number}")
    senders = [WebhookSender(database, settings) for _ in range(2)]
    for sender in senders:
        sender.start()
    arrived = receiver.wait_for(24)
    deadline = time.monotonic() + PATIENCE_S
    while delivered(database) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for sender in senders:
        sender.stop(PATIENCE_S)
    counts = [headers["webhook-id"] for headers, _ in arrived]
    assert {counts.count(event) for event in counts} == {2}, "refused once and taken once"
    assert len(receiver.received) == 24
    database.dispose()


def delivered(database: Database) -> int:
    with database.read() as session:
        return len(webhooks.deliveries(session, 100, status="delivered").deliveries)


@contextmanager
def an_api_server(settings: JobsSettings, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BASIC_")}
    own = {
        "BASIC_DATA_DIR": str(settings.data_dir),
        "BASIC_REDIS_URL": "redis://127.0.0.1:1/0",
        "BASIC_TARGET": "tiny",
        "BASIC_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "BASIC_WEBHOOK_TIMEOUT_S": "300",
        "BASIC_API_PORT": "0",
    }
    command = [sys.executable, "-m", "jobs.cli", "api", "--ready-file", str(ready)]
    with (folder / "api.log").open("ab") as words:
        process = subprocess.Popen(command, env=inherited | own, stderr=words, stdout=words)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not ready.exists():
            assert process.poll() is None, (folder / "api.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process, ready.read_text().strip()
    finally:
        process.kill()
        process.wait()


def test_kill_9_of_the_api_server_while_it_sends_loses_no_event(
    receiver: Receiver, openai: OpenAI, tmp_path: Path
) -> None:
    settings = JobsSettings(data_dir=tmp_path)
    schema.upgrade(settings.resolved_database_url)
    dead = threading.Event()
    receiver.answer = held_until(dead)
    with an_api_server(settings, tmp_path) as (process, url), httpx.Client(base_url=url, trust_env=False) as api:
        hook = {"url": receiver.url, "event_types": ["batch.cancelled"]}
        secret = api.post("/v1/webhook_endpoints", json=hook).json()["signing_secret"]
        jobs = [api.post("/v1/jobs", json={"prompts": ["Hello"]}).json()["id"] for _ in range(5)]
        for job in jobs:
            assert api.post(f"/v1/jobs/{job}/cancel").json()["status"] == "cancelled"
        receiver.wait_for(2)  # the other three wait in the outbox
        process.kill()
        process.wait()
    held = receiver.wait_for(2)
    database = Database.open(settings.resolved_database_url)
    with database.write() as session:  # as if the claims of the dead server had ended
        session.execute(text("UPDATE webhook_deliveries SET next_at = 0 WHERE status = 'pending'"))
    database.dispose()
    dead.set()
    receiver.answer = status(204)
    with an_api_server(settings, tmp_path) as (_, url), httpx.Client(base_url=url, trust_env=False) as api:
        arrived = receiver.wait_for(len(held) + 5)[len(held) :]
        deadline = time.monotonic() + PATIENCE_S
        while len(api.get("/v1/webhook_deliveries?status=delivered").json()["data"]) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    events = [openai.webhooks.unwrap(body, headers, secret=secret) for headers, body in arrived]
    assert sorted(json.loads(body)["data"]["id"] for _, body in arrived) == sorted(jobs)
    assert {event.type for event in events} == {"batch.cancelled"}
    ids = {headers["webhook-id"] for headers, _ in held}
    assert ids < {headers["webhook-id"] for headers, _ in arrived}, "an event that is sent again keeps its id"
    assert json.loads(arrived[0][1])["data"].keys() == {"id", "status"}
