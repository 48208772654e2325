"""`basic jobs`, `edit`, `pause` and `resume`, against a service in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.cli import lookup
from jobs.cli.options import FAILED, WRONG_USE
from jobs.errors import JobEnded
from storage.session import Database
from tests.unit.jobs.api.test_routes import answer_all
from tests.unit.jobs.cli.test_cli import Run, prompts, run

__all__ = ["prompts", "run"]  # fixtures


def submit(run: Run, prompts: str, *options: str) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(run("submit", prompts, "--json", *options))
    return job


def listed(run: Run, *options: str) -> list[str]:
    return [job["id"] for job in json.loads(run("jobs", "--json", *options))]


def test_a_job_is_found_by_what_it_was_submitted_with(run: Run, prompts: str) -> None:
    options = ("--name", "nightly run", "--label", "team=search", "--label", "stage=a=b")
    job = submit(run, prompts, *options, "--priority", "low", "--max-concurrent", "3")
    submit(run, prompts)

    assert (job["name"], job["labels"]) == ("nightly run", {"team": "search", "stage": "a=b"})
    assert (job["priority"], job["max_concurrent"]) == ("low", 3)
    for found in (
        ("--label", "team=search", "--label", "stage"),
        ("--search", "NIGHTLY"),
        ("--name", "nightly run", "--status", "in_progress"),
    ):
        assert listed(run, *found) == [job["id"]]
    assert "nightly run" in run("jobs")
    assert run("jobs", "--label", "team=ads") == "No job meets all of these conditions.\n"
    shown = run("status", job["id"][:12])
    for words in ("nightly run", "team=search, stage=a=b", "low", "3 requests at once"):
        assert words in shown


def test_a_job_is_changed_paused_and_resumed_by_a_prefix_of_its_id(run: Run, prompts: str) -> None:
    job = submit(run, prompts, "--name", "first", "--label", "a=1", "--label", "b=2", "--max-concurrent", "3")
    prefix = job["id"][:14]

    assert (
        run("edit", prefix, "--name", "second", "--label", "c=3", "--remove-label", "a") == f"Changed job {job['id']}\n"
    )
    changed = json.loads(run("edit", prefix, "--max-concurrent", "0", "--priority", "high", "--json"))
    assert (changed["name"], changed["labels"]) == ("second", {"b": "2", "c": "3"})
    assert (changed["max_concurrent"], changed["priority"]) == (None, "high")
    assert json.loads(run("edit", prefix, "--name", "", "--json"))["name"] is None

    assert "is paused" in run("pause", prefix)
    assert listed(run, "--status", "paused") == [job["id"]]
    assert "paused" in run("status", prefix)
    assert "is in progress" in run("resume", prefix)


def test_a_wrong_label_and_an_empty_change_are_refused_before_anything_is_sent(run: Run, prompts: str) -> None:
    for command in (
        ("submit", prompts, "--label", "team"),
        ("submit", prompts, "--label", "team=a", "--label", "team=b"),
        ("jobs", "--label", "=a"),
        ("edit", "batch_0"),
    ):
        run(*command, status=WRONG_USE)
    assert listed(run) == []


def test_an_ended_job_is_not_paused(run: Run, prompts: str, database: Database) -> None:
    job = submit(run, prompts)
    answer_all(database)
    with pytest.raises(JobEnded, match="Cannot pause a job with status 'completed'"):
        run("pause", job["id"], status=FAILED)


def test_the_client_manages_jobs_as_the_command_does(run: Run) -> None:
    with lookup.connect() as client:
        job = client.submit(["Hello"], name="first", labels={"team": "search"}, priority="high", max_concurrent=1)

        assert [found.id for found in client.jobs(labels={"team": "search"}, status=["in_progress"])] == [job.id]
        assert (job.pause().status, client.pause(job.id).pause_reason) == ("paused", "user")
        assert client.jobs(status="in_progress") == []
        assert (client.resume(job.id).status, job.resume().paused_at) == ("in_progress", None)
        changed = client.change(job.id, labels={"team": None, "run": "1"}, name=None)
        assert (changed.name, changed.labels, changed.priority) == (None, {"run": "1"}, "high")
        assert job.change(max_concurrent=None).max_concurrent is None
