"""A job is estimated from a pilot and run on, and another one stops at its budget: through the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import Service

REQUESTS, PILOT, TOKENS = 24, 6, 5
OPTIONS = ("--max-tokens", str(TOKENS), "--temperature", "0", "--json")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("estimate") / "prompts.jsonl"
    file.write_text("".join(json.dumps(f"Name {n} rivers.") + "\n" for n in range(2, 2 + REQUESTS)))
    return str(file)


def printed(service: Service, *arguments: str) -> Any:
    done = service.basic(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def job_when(service: Service, job: str, *statuses: str) -> Any:
    while (found := httpx.get(f"{service.api_url}/v1/jobs/{job}").json())["status"] not in statuses:
        time.sleep(0.2)
    return found


def resumed(service: Service, job: str) -> None:
    assert httpx.post(f"{service.api_url}/v1/jobs/{job}/resume").status_code == 200
    assert job_when(service, job, "completed", "paused")["status"] == "completed"


def texts(service: Service, job: str) -> list[str]:
    found = service.rows("SELECT text FROM outputs WHERE job_id = ? ORDER BY request_index", job)
    assert len(found) == REQUESTS
    return [text for (text,) in found]


@pytest.fixture(scope="module")
def plain(service: Service, prompts: str) -> list[str]:
    """The texts of the job as it is submitted without pilot or budget."""
    job = printed(service, "submit", prompts, *OPTIONS, "--wait")
    return texts(service, job["id"])


def test_a_pilot_predicts_the_job_and_its_answers_are_kept(service: Service, prompts: str, plain: list[str]) -> None:
    predicted = printed(service, "estimate", prompts, "--pilot", str(PILOT), *OPTIONS)
    job = predicted["job_id"]
    shown = job_when(service, job, "paused")
    assert (shown["pause_reason"], shown["request_counts"]["completed"]) == ("pilot", PILOT)
    rest = predicted["rest"]
    assert rest["requests"] == REQUESTS - PILOT
    assert 0 < rest["completion_tokens"]["estimate"] <= (REQUESTS - PILOT) * TOKENS
    assert rest["seconds"]["low"] <= rest["seconds"]["estimate"] <= rest["seconds"]["high"]
    ran_first = service.rows("SELECT request_index FROM outputs WHERE job_id = ?", job)
    resumed(service, job)
    assert texts(service, job) == plain
    assert service.rows("SELECT DISTINCT attempts FROM requests WHERE job_id = ?", job) == [(1,)]
    assert printed(service, "estimate", "--job", job, "--json")["pilot"]["requests"] == len(ran_first)


def test_a_job_that_reaches_its_budget_pauses_and_ends_with_the_same_texts(
    service: Service, prompts: str, plain: list[str]
) -> None:
    # One request after the other: whole jobs of this size can end between two flushes.
    fields = {"max_tokens": TOKENS, "temperature": 0, "max_concurrent": 1, "budget": {"tokens": 60}}
    requests = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    job = httpx.post(f"{service.api_url}/v1/jobs", json={"requests": requests, **fields}).json()["id"]
    shown = job_when(service, job, "paused", "completed")
    assert (shown["status"], shown["pause_reason"]) == ("paused", "budget_tokens")
    assert shown["progress"]["prompt_tokens"] + shown["progress"]["completion_tokens"] >= 60
    refused = httpx.post(f"{service.api_url}/v1/jobs/{job}/resume").json()["error"]
    assert (refused["code"], refused["param"]) == ("budget_spent", "budget.tokens")
    httpx.patch(f"{service.api_url}/v1/jobs/{job}", json={"budget": {"tokens": None}}).raise_for_status()
    resumed(service, job)
    assert texts(service, job) == plain
