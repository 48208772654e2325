"""`/metrics`: what Prometheus reads."""

from __future__ import annotations

import re

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from storage import leases, writes
from storage.session import Database
from tests.factories import a_worker_card
from tests.paths import ROOT
from tests.unit.jobs.api.test_routes import answer_all, api, notified, submitted
from tests.unit.storage.acts import cancel, leave_dead, record

__all__ = ["api", "notified"]  # fixtures

LOAD = {
    "sequences": 3,
    "kv_tokens": 120,
    "kv_capacity_tokens": 1000,
    "tokens": 50,
    "steps": {"tree": 7, "probe": 1},
    "draft_ms": 100.0,
    "verify_ms": 700.0,
    "step_ms": 1000.0,
}


class Samples(dict[tuple[str, frozenset[str]], float]):
    """Samples by name and label values, in any order."""

    def of(self, name: str, *labels: str) -> float:
        return self[name, frozenset(labels)]


def scrape(api: TestClient) -> Samples:
    """All samples, read as Prometheus does."""
    reply = api.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(reply.text)
    return Samples(
        ((sample.name, frozenset(sample.labels.values())), sample.value)
        for family in families
        for sample in family.samples
    )


def test_queue_leases_tokens_and_errors_are_exported(api: TestClient, database: Database) -> None:
    submitted(api, "Hello", {"prompt": ""})
    answer_all(database)
    submitted(api, "a", "b", "c")
    with database.write() as session:
        leases.claim(session, "w", "tiny", 1, 30.0)
    with database.write() as session:
        leases.claim(session, "w", "tiny", 1, -1.0)

    seen = scrape(api)

    assert seen.of("basic_jobs_open", "tiny") == 1
    assert seen.of("basic_requests_open", "tiny", "queued") == 1
    assert seen.of("basic_requests_open", "tiny", "running") == 2
    assert (seen.of("basic_leases", "held"), seen.of("basic_leases", "lapsed")) == (1, 1)
    assert seen.of("basic_requests_ended_total", "tiny", "completed") == 1
    assert seen.of("basic_requests_ended_total", "tiny", "failed") == 1
    assert seen.of("basic_tokens_total", "tiny", "completion") == 2
    assert sum(value for (name, _), value in seen.items() if name == "basic_request_errors_total") == 1


def test_events_for_webhooks_that_wait_or_are_dead_are_exported(api: TestClient, database: Database) -> None:
    leave_dead(database)
    record(database, "waits")
    cancel(database, "waits")

    seen = scrape(api)

    assert (seen.of("basic_webhook_deliveries", "pending"), seen.of("basic_webhook_deliveries", "dead")) == (1, 1)


def test_live_workers_export_their_load_and_counters(api: TestClient, database: Database) -> None:
    with database.write() as session:
        for worker in ("alive", "stopped"):
            writes.register_worker(session, a_worker_card(id=worker))
            writes.update_load(session, worker, LOAD)
        writes.register_worker(session, a_worker_card(id="new"))  # has reported no load yet
        writes.mark_stopped(session, "stopped")

    seen = scrape(api)

    up = {labels - {"tiny", "localhost"} for name, labels in seen if name == "basic_worker_up"}
    assert up == {frozenset({"alive"}), frozenset({"new"})}
    assert seen.of("basic_worker_kv_tokens", "alive") == 120
    assert seen.of("basic_worker_steps_total", "alive", "tree") == 7
    assert seen.of("basic_worker_seconds_total", "alive", "host") == 0.2
    assert not any("stopped" in labels for _, labels in seen)


def test_latency_is_labelled_by_route_never_by_path(api: TestClient) -> None:
    api.get("/healthz")
    api.get("/v1/jobs/batch_1")
    api.get("/v1/jobs/batch_2")
    api.get("/no/such/place")
    api.request("BREW", "/healthz")

    seen = scrape(api)
    count = "basic_http_request_seconds_count"

    assert seen.of(count, "GET", "/healthz", "200") == 1
    assert seen.of(count, "GET", "/v1/jobs/{job_id}", "404") == 2
    assert seen.of(count, "GET", "other", "404") == 1
    assert not any("BREW" in labels or "/no/such/place" in labels for _, labels in seen)


def test_dashboard_and_alerts_use_existing_metrics(api: TestClient, database: Database) -> None:
    submitted(api, "Hello", {"prompt": ""})
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id="w"))
        full = dict.fromkeys(("waiting_sequences", "max_sequences", "batch_sequences", "tree_nodes"), 1)
        accepted = dict.fromkeys(("accepted_tokens", "expected_accepted", "joules", "recomputed_tokens"), 1)
        writes.update_load(session, "w", LOAD | full | accepted)
    api.get("/healthz")
    told = {name for name, _ in scrape(api)}

    folder = ROOT / "docs" / "monitoring"
    asked = {
        name for path in folder.rglob("*.*") for name in re.findall(r"\bbasic_[a-z_]+\b(?=[{\[ )/])", path.read_text())
    }

    assert len(asked) > 15
    assert asked - told - {"basic_request_errors_total"} == set()
