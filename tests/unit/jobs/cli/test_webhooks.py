"""`basic webhooks`, `basic rm`, `basic db prune` and ages of keys, as a person types them."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import func, select
from typer.testing import CliRunner

from jobs.cli import app as cli
from jobs.cli.options import WRONG_USE
from jobs.errors import NotDeletable
from jobs.settings import JobsSettings
from storage.models import ChoiceOutput, JobRow, PackedSteps, Request
from storage.session import Database
from tests.unit.jobs.cli.test_cli import Run, prompts, run
from tests.unit.storage.acts import claim_one, flush, record, whole

__all__ = ["prompts", "run"]  # fixtures

URL = "https://203.0.114.1/hook"


def test_a_webhook_is_added_listed_rotated_and_removed_and_its_secret_is_shown_once(run: Run) -> None:
    secret = run("webhooks", "add", URL, "--event", "batch.completed", "--name", "nightly").strip()
    assert secret.startswith("whsec_")
    (found,) = json.loads(run("webhooks", "list", "--json"))["data"]
    assert (found["url"], found["event_types"], found["name"]) == (URL, ["batch.completed"], "nightly")
    table = run("webhooks", "list")
    assert secret not in table
    assert found["id"] in table
    rotated = run("webhooks", "rotate", found["id"][:9], "--keep-old").strip()
    assert rotated != secret
    run("webhooks", "rm", found["id"])
    assert "basic webhooks add" in run("webhooks", "list")


def test_the_deliveries_of_a_job_are_listed_and_sent_again(run: Run, prompts: str) -> None:
    job = json.loads(run("submit", prompts, "--json"))["id"]
    hook = json.loads(run("webhooks", "add", URL, "--job", job, "--json"))
    assert len(hook["event_types"]) == 8, "every event, unless some are named"
    run("cancel", job)
    (waiting,) = json.loads(run("webhooks", "deliveries", hook["id"], "--json"))["data"]
    assert (waiting["job_id"], waiting["event_type"], waiting["status"]) == (job, "batch.cancelled", "pending")
    assert waiting["id"] in run("webhooks", "deliveries")
    assert "no delivery" in run("webhooks", "deliveries", "--dead")
    assert "pending" in run("webhooks", "redeliver", waiting["id"])


def test_rm_erases_jobs_by_prefix_and_refuses_one_that_runs(run: Run, prompts: str, database: Database) -> None:
    jobs = [json.loads(run("submit", prompts, "--json"))["id"] for _ in range(2)]
    with pytest.raises(NotDeletable, match="basic rm --cancel"):
        run("rm", jobs[0])
    assert f"Erased job {jobs[1]}" in run("rm", "--cancel", jobs[0], jobs[1][:20])
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Request)) == 0


@pytest.mark.usefixtures("migrated")
def test_prune_deletes_what_is_named_and_keeps_the_jobs() -> None:
    database = Database.open(JobsSettings().resolved_database_url)
    record(database)
    flush(database, "w1", whole(claim_one(database).lease, 1))
    assert json.loads(basic("db", "prune", "--outputs-older-than", "0m", "--json")) == {"deleted_outputs": 1}
    with database.read() as session:
        tables = (JobRow, ChoiceOutput, PackedSteps)
        assert [session.scalar(select(func.count()).select_from(table)) for table in tables] == [1, 0, 1]
    database.dispose()
    assert "Nothing was old enough" in basic("db", "prune")
    basic("db", "prune", "--prompts-older-than", "soon", status=WRONG_USE)


def basic(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.mark.usefixtures("migrated")
def test_a_key_has_ages_of_its_own() -> None:
    basic("keys", "create", "alice", "--retention", "prompts=7d, outputs=30d")
    basic("keys", "update", "alice", "--retention", "prompts=default,files=1d")
    (key,) = json.loads(basic("keys", "list", "--json"))
    assert key["kept_s"] == {"outputs": 30 * 86_400.0, "files": 86_400.0}
    assert "keeps outputs 30 d" in " ".join(basic("keys", "list").split())
    for wrong in ("texts=7d", "prompts=7", "prompts"):
        basic("keys", "create", "bob", "--retention", wrong, status=WRONG_USE)
