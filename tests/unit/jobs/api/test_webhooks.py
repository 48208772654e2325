"""Webhook endpoints through the real `openai` client, which also verifies what is signed; which URLs are refused."""

from __future__ import annotations

import json
import time
from ipaddress import ip_address
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from jobs.api.schemas.webhooks import WebhookDeliveryPage, WebhookEndpointPage, WebhookEndpointSecretReply
from jobs.webhooks import addresses, endpoints, sender
from jobs.webhooks.addresses import AddressRefused, AddressRules
from jobs.webhooks.request import WebhookEvent
from jobs.webhooks.signature import new_secret, signed_headers
from storage.session import Database
from storage.webhooks import EVENT_TYPES
from tests.factories import a_key
from tests.unit.jobs.api.test_routes import submitted
from tests.unit.jobs.openai_client import checked

HOOK: dict[str, Any] = {
    "name": "nightly",
    "url": "https://203.0.114.1/hook",
    "event_types": ["batch.completed", "batch.cancelled"],
}


def added(api: TestClient, **fields: Any) -> dict[str, Any]:
    reply = api.post("/v1/webhook_endpoints", json=HOOK | fields)
    assert reply.status_code == 200, reply.text
    WebhookEndpointSecretReply.model_validate(reply.json())
    return dict(reply.json())


def refusal(api: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> str:
    reply = api.post("/v1/webhook_endpoints", json=HOOK | fields, headers=headers)
    assert reply.status_code in (400, 403, 404), reply.text
    return str(reply.json()["error"]["message"])


def test_the_openai_client_manages_endpoints_and_sees_the_secret_once(client: OpenAI) -> None:
    made = checked(client.webhooks.create(**HOOK))
    assert made.signing_secret.startswith("whsec_")
    again = checked(client.webhooks.retrieve(made.id))
    assert (again.url, again.event_types, again.name) == (HOOK["url"], HOOK["event_types"], "nightly")
    assert made.signing_secret not in again.to_json()
    assert [one.id for one in client.webhooks.list()] == [made.id]
    changed = checked(client.webhooks.update(made.id, name="daily", event_types=["batch.failed"]))
    assert (changed.name, changed.event_types, changed.url) == ("daily", ["batch.failed"], HOOK["url"])
    rotated = checked(client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True))
    assert rotated.signing_secret != made.signing_secret
    assert client.webhooks.event_types.list().data == list(EVENT_TYPES)
    assert checked(client.webhooks.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)


def test_what_is_signed_is_verified_by_the_openai_client_and_read_as_its_event(client: OpenAI) -> None:
    event, secret, old = (
        WebhookEvent("evt_1", "batch.completed", "batch_1", 1_700_000_000.7),
        new_secret(),
        new_secret(),
    )
    headers = signed_headers(event.id, int(time.time()), event.body(), [secret, old])
    for key in (secret, old):
        read = client.webhooks.unwrap(event.body(), headers, secret=key)
        assert read.to_dict() == json.loads(event.body())
    for body, key in ((event.body(), new_secret()), (event.body() + b" ", secret)):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, headers, secret=key)
    for kind in EVENT_TYPES:
        event = WebhookEvent("evt_1", kind, "x_1", 1.0)
        headers = signed_headers(event.id, int(time.time()), event.body(), [secret])
        assert type(client.webhooks.unwrap(event.body(), headers, secret=secret)).__name__ != "BaseModel"


def test_an_endpoint_names_events_and_a_url_and_jobs_that_its_key_may_see(api: TestClient, database: Database) -> None:
    assert "must be of batch.completed" in refusal(api, event_types=["batch.done"])
    assert "https://" in refusal(api, url="http://203.0.114.1/")
    assert "public" in refusal(api, url="https://127.0.0.1:8000/v1/jobs")
    assert "Unknown field" in refusal(api, colour="red")
    job = submitted(api, "Hello")
    hook = added(api, job_id=job["id"])
    api.post(f"/v1/jobs/{job['id']}/cancel")
    page = api.get(f"/v1/webhook_endpoints/{hook['id']}/deliveries").json()
    WebhookDeliveryPage.model_validate(page)
    assert [(one["event_type"], one["job_id"], one["status"]) for one in page["data"]] == [
        ("batch.cancelled", job["id"], "pending")
    ]
    assert page == api.get("/v1/webhook_deliveries?status=pending").json()
    assert "cancelled already" in refusal(api, job_id=job["id"])
    stranger = a_key(database)
    assert "no job" in refusal(api, stranger, job_id=job["id"])
    assert "admin" in refusal(api, stranger, all_keys=True)
    assert api.get("/v1/webhook_endpoints", headers=stranger).json()["data"] == []
    assert api.get(f"/v1/webhook_endpoints/{hook['id']}", headers=stranger).status_code == 404
    assert api.post(f"/v1/webhook_deliveries/{page['data'][0]['id']}/redeliver", headers=stranger).status_code == 404


def test_a_key_has_a_bounded_number_of_endpoints_in_pages(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoints._MAX_ENDPOINTS == 100
    monkeypatch.setattr(endpoints, "_MAX_ENDPOINTS", 10)
    ids = [added(api)["id"] for _ in range(10)]
    assert "at most 10 " in refusal(api)
    first = api.get("/v1/webhook_endpoints?limit=6").json()
    WebhookEndpointPage.model_validate(first)
    rest = api.get(f"/v1/webhook_endpoints?limit=6&after={first['last_id']}").json()
    assert sorted(one["id"] for one in first["data"] + rest["data"]) == sorted(ids)
    assert (first["has_more"], rest["has_more"]) == (True, False)


PRIVATE = (
    "127.0.0.1 10.1.2.3 192.168.0.1 169.254.169.254 168.63.129.16 100.64.0.1 0.0.0.0 224.0.0.1 "
    "::1 fe80::1 fd00:ec2::254 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: ff02::1 ::"
)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_loopback_link_local_and_metadata_addresses_are_refused_in_every_spelling(address: str) -> None:
    with pytest.raises(AddressRefused, match="BASIC_WEBHOOK_NETWORKS"):
        AddressRules().check_address(ip_address(address), "https")


def test_allowed_networks_are_reached_over_http_too_and_public_addresses_over_https_only() -> None:
    rules = AddressRules.of("127.0.0.0/8, fd00::/8")
    for address in ("127.0.0.1", "::ffff:127.0.0.1", "fd00::1"):
        rules.check_address(ip_address(address), "http")
    rules.check_address(ip_address("203.0.114.1"), "https")
    for address, scheme in (("203.0.114.1", "http"), ("10.0.0.1", "https")):
        with pytest.raises(AddressRefused):
            rules.check_address(ip_address(address), scheme)


@pytest.mark.parametrize(
    "url",
    ["ftp://203.0.114.1/", "https:///x", "https://a@203.0.114.1/", "https://203.0.114.1:99999/", "x", "https://[x/"],
)
def test_what_is_no_url_of_a_host_is_refused(url: str) -> None:
    with pytest.raises(AddressRefused):
        AddressRules().check_url(url)


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [ip_address("203.0.114.1"), ip_address("10.0.0.1")]
    monkeypatch.setattr(addresses, "resolve", lambda host, port: found)
    with pytest.raises(AddressRefused, match=r"10\.0\.0\.1"):
        AddressRules().check_url("https://mixed.example/")


def test_the_pauses_between_attempts_double_from_seconds_to_hours() -> None:
    age_s, attempts = 0.0, 0
    while age_s < 86_400:
        age_s += sender.retry_pause_s(age_s)
        attempts += 1
    assert 15 <= attempts <= 40
    assert sender.retry_pause_s(0.0) <= 6.0
    assert sender.retry_pause_s(1e9) <= 1.2 * 3 * 3600


def test_an_event_holds_ids_and_status_and_no_text() -> None:
    body = json.loads(WebhookEvent("evt_1", "response.incomplete", "resp_1", 5.9).body())
    assert body == {
        "id": "evt_1",
        "object": "event",
        "created_at": 5,
        "type": "response.incomplete",
        "data": {"id": "resp_1", "status": "incomplete"},
    }
