from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from jobs.settings import JobsSettings
from jobs.upkeep.doctor import Finding, examine
from jobs.upkeep.import_names import shared_names
from storage import schema, writes
from storage.session import Database
from tests.conftest import free_port
from tests.databases import write_migrated
from tests.factories import a_worker_card
from tests.unit.storage.acts import leave_dead, record


def found(settings: JobsSettings) -> dict[str, Finding]:
    """The findings by part; the worst one of each."""
    worst: dict[str, Finding] = {}
    for finding in sorted(examine(settings), key=lambda f: ("ok", "warning", "problem").index(f.status)):
        worst[finding.part] = finding
    return worst


@pytest.fixture
def installed(tmp_path: Path) -> JobsSettings:
    """An installation whose database is up to date and whose servers are down."""
    settings = JobsSettings(
        data_dir=tmp_path,
        redis_url=f"redis://:hunter2@127.0.0.1:{free_port()}/0",
        api_url=f"http://127.0.0.1:{free_port()}",
    )
    write_migrated(Path(settings.resolved_database_url.removeprefix("sqlite:///")))
    return settings


def test_an_unavailable_part_is_a_finding_with_advice_and_no_password(installed: JobsSettings) -> None:
    findings = found(installed)

    assert findings["redis"].status == "problem"
    assert "BASIC_REDIS_URL" in findings["redis"].advice
    assert findings["API server"].status == "warning"
    assert "hunter2" not in repr(findings)
    for part in ("disk", "database", "migrations", "clock"):
        assert findings[part].status == "ok", findings[part]


def test_every_finding_that_is_not_ok_says_what_to_do(installed: JobsSettings) -> None:
    assert [f for f in examine(installed) if f.status == "problem" and not f.advice] == []


def test_a_missing_or_old_database_is_a_finding(tmp_path: Path) -> None:
    settings = JobsSettings(data_dir=tmp_path, redis_url="redis://127.0.0.1:1/0", api_url="http://127.0.0.1:1")
    assert "basic db upgrade" in found(settings)["database"].advice

    schema.upgrade(settings.resolved_database_url, "0001")
    assert found(settings)["migrations"].advice == "run: basic db upgrade"


def test_unserved_and_stuck_jobs_are_findings(installed: JobsSettings) -> None:
    database = Database.open(installed.resolved_database_url)
    record(database, "unserved", model="large")
    assert "BASIC_TARGET=large" in found(installed)["jobs"].advice

    with database.write() as session:
        session.execute(text("DELETE FROM requests"))
        session.execute(text("DELETE FROM jobs"))
        writes.register_worker(session, a_worker_card(id="w", target="tiny"))
    record(database, "stuck", model="tiny")
    assert found(installed)["jobs"].status == "ok"
    with database.write() as session:
        session.execute(text("UPDATE jobs SET created_at = created_at - 3600"))
    database.dispose()
    assert "stuck" in found(installed)["jobs"].message


def test_the_capacity_that_a_live_worker_chose_is_a_finding(installed: JobsSettings) -> None:
    database = Database.open(installed.resolved_database_url)
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id="w", context_tokens=8192))
        writes.update_load(session, "w", {"max_sequences": 64, "kv_capacity_tokens": 100_000})
    database.dispose()
    message = found(installed)["capacity"].message
    assert message == "tiny on localhost, process 1: 100,000 KV tokens, up to 64 sequences of up to 8,192 tokens"


def test_an_endpoint_whose_events_are_dead_is_a_finding_that_shows_no_secret_of_its_url(
    installed: JobsSettings,
) -> None:
    database = Database.open(installed.resolved_database_url)
    leave_dead(database)
    database.dispose()
    finding = found(installed)["webhooks"]
    assert (finding.status, finding.message) == ("warning", "wh_1 at example.com did not take 1 events: they are dead")
    assert "basic webhooks deliveries wh_1 --dead" in finding.advice
    assert "basic webhooks redeliver" in finding.advice


def test_a_distribution_that_owns_one_of_our_import_names_is_named() -> None:
    owners = {"jobs": ["basic-batch", "other-jobs"], "storage": ["basic-batch"], "migrations": ["someone-else"]}
    assert list(shared_names(owners)) == [("jobs", "other-jobs")]
