from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.api.app import make_api
from jobs.cli import lookup
from jobs.errors import BudgetSpent, NoPilot
from jobs.settings import JobsSettings
from storage.session import Database
from tests.api_client import ApiClient
from tests.unit.jobs.api.test_routes import answer_all
from tests.unit.jobs.cli.test_cli import Run, run

__all__ = ["run"]

LINES = "".join(f'{{"prompt": "Count to {n}.", "max_tokens": 8}}\n' for n in range(5))


def submitted(**fields: Any) -> str:
    """Submit the lines to the service of `run`; return the id of the job."""
    with lookup.connect() as client:
        return client.submit(LINES.encode(), **fields).id


def test_a_pilot_is_answered_first_and_predicts_the_rest_which_then_waits(run: Run, database: Database) -> None:
    job = submitted(pilot=2)
    answer_all(database, limit=100, prompt_tokens=5, completion_tokens=4)
    status = json.loads(run("status", job, "--json"))
    assert status["status"] == "paused"
    assert status["request_counts"]["completed"] == 2, "the answers of the pilot count"
    predicted = json.loads(run("estimate", "--job", job, "--json"))
    assert predicted["pilot"] == {"requests": 2, "completed": 2, "prompt_tokens": 10, "completion_tokens": 8}
    assert predicted["rest"]["requests"] == 3
    assert predicted["rest"]["completion_tokens"]["estimate"] == pytest.approx(3 * 4)
    assert predicted["rest"]["joules"] is None
    told = run("estimate", "--job", job)
    assert f"basic resume {job}" in told
    assert "not measurable here" in told
    assert "BASIC_POWER_W" in told


def test_an_estimate_that_may_run_on_ends_with_every_request_answered_once(run: Run, database: Database) -> None:
    job = submitted(pilot={"requests": 2, "seed": 3})
    answer_all(database, limit=100)
    assert "The rest is running" in run("estimate", "--job", job, "--run")
    answer_all(database, limit=100)
    status = json.loads(run("status", job, "--json"))
    assert (status["status"], status["request_counts"]["completed"]) == ("completed", 5)


def test_a_job_without_a_pilot_can_not_be_estimated(run: Run) -> None:
    with pytest.raises(NoPilot, match="basic estimate"):
        run("estimate", "--job", submitted())


def test_a_job_that_has_spent_its_budget_says_what_was_spent_and_how_to_raise_it(
    run: Run, database: Database, settings: JobsSettings
) -> None:
    job = submitted(budget={"tokens": 10})
    answer_all(database, limit=3, prompt_tokens=5, completion_tokens=4)
    api = ApiClient(make_api(settings, database, notify=lambda job_id, model: True))
    shown = api.get(f"/v1/jobs/{job}").json()
    assert (shown["status"], shown["pause_reason"]) == ("paused", "budget_tokens")
    assert shown["budget"] == {"tokens": 10, "seconds": None}
    with (
        lookup.connect() as client,
        pytest.raises(BudgetSpent, match=r"27 of its budget of 10 tokens.*--budget-tokens"),
    ):
        client.job(job).resume()
    assert f"basic resume {job} --budget-tokens N" in "".join(run("status", job).split("\n"))
    assert json.loads(run("resume", job, "--budget-tokens", "10000", "--json"))["status"] == "in_progress"
    answer_all(database, limit=100)
    assert api.get(f"/v1/jobs/{job}").json()["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"budget": {"tokens": 0}}, "budget.tokens"),
        ({"budget": {"seconds": -1}}, "budget.seconds"),
        ({"budget": {"joules": 1}}, "budget.joules"),
        ({"budget": 5}, "budget"),
        ({"pilot": 0}, "pilot"),
        ({"pilot": {"seed": "x"}}, "pilot.seed"),
    ],
)
def test_a_budget_or_pilot_that_means_nothing_is_refused_by_name(
    settings: JobsSettings, database: Database, fields: dict[str, Any], param: str
) -> None:
    api = ApiClient(make_api(settings, database, notify=lambda job_id, model: True))
    reply = api.post("/v1/jobs", json={"prompts": ["Hello"], **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
