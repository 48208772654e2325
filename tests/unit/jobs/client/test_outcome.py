"""The status of a job in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli.render import closing_table, jobs_table, make_console
from jobs.client.outcome import completed_with_failures, status_text
from jobs.client.progress_bar import speed_text
from jobs.client.results import JobInfo, Output, Statistics
from jobs.messages import JobStatus
from jobs.reports.report import make_report
from tests.unit.jobs.cli.test_cli import Run, prompts, run

__all__ = ["prompts", "run"]  # fixtures

SUMS = ("requests_completed", "requests_failed", "requests_total", "completion_tokens", "prompt_tokens", "wall_s")
LISTS = ("acceptance", "minutes", "batch_sizes", "reliability")
NUMBERS: Statistics = dict.fromkeys(SUMS, 0) | {name: [] for name in LISTS}
FAILURES = "\n".join(json.dumps({"prompt": "Hello", "max_tokens": 0}) for _ in range(3))


@pytest.mark.parametrize(
    ("completed", "failed", "words"),
    [(10, 0, "completed"), (7, 3, "completed, 3 failed"), (0, 10, "completed, all failed"), (0, 0, "completed")],
)
def test_a_completed_job_says_how_many_requests_failed(completed: int, failed: int, words: str) -> None:
    assert status_text("completed", completed, failed) == words
    assert completed_with_failures("completed", failed) == (failed > 0)


@pytest.mark.parametrize("status", [status for status in JobStatus if status is not JobStatus.COMPLETED])
def test_every_other_status_is_its_own_word(status: JobStatus) -> None:
    assert status_text(status, 0, 3) == status.value.replace("_", " ")
    assert not completed_with_failures(status, 3)


def info(completed: int, failed: int) -> JobInfo:
    counts = {"total": completed + failed, "completed": completed, "failed": failed}
    values = {"id": "job-1", "status": "completed", "model": "m", "endpoint": "/v1/completions", "created_at": 0}
    return JobInfo.model_validate(values | {"request_counts": counts, "progress": {}})


def test_the_progress_of_a_job_says_once_what_failed() -> None:
    assert speed_text(info(0, 10)) == "0 tokens · completed, all failed"
    assert speed_text(info(7, 3)) == "0 tokens · completed, 3 failed"
    assert speed_text(info(7, 0)) == "0 tokens · completed"


def test_a_job_whose_requests_all_failed_is_no_plain_success_on_the_terminal(run: Run) -> None:
    job_id = json.loads(run("submit", "-", "--json", stdin=FAILURES, status=1))["id"]

    assert "completed, all failed" in run("status", job_id)
    assert json.loads(run("status", job_id, "--json"))["status"] == "completed", "programs read OpenAI's word"
    console = make_console()
    with console.capture() as shown:
        console.print(closing_table(info(0, 3), {}, None), jobs_table([info(0, 3)], 80, 0.0))
    assert " ".join(shown.get().split()).count("all failed") == 2


def test_a_report_shows_failures_in_the_colour_of_a_warning(run: Run, tmp_path: Path) -> None:
    job_id = json.loads(run("submit", "-", "--json", stdin=FAILURES, status=1))["id"]
    path = tmp_path / "report.html"
    run("report", job_id, "-o", str(path))

    page = path.read_text()

    assert '<strong class="warning">completed, all failed</strong>' in page
    assert "Samples" not in page, "there are none"


def test_a_report_of_a_success_does_not_warn() -> None:
    assert '<strong class="warning">' not in make_report(info(3, 0), NUMBERS, [])


def test_a_report_of_very_many_errors_counts_those_it_leaves_out() -> None:
    page = report_of([f"requests[{n}], n: Message {n}." for n in range(60)] + ["line 7, n: Message 3."])
    assert page.count("odd: Message ") == 50
    assert "odd: Message 3.</th><td>2</td>" in page
    assert "odd: other messages</th><td>10</td>" in page


def report_of(messages: list[str]) -> str:
    error = {"custom_id": "a", "index": 0, "status": "failed"}
    outputs = [Output.model_validate(error | {"error": {"code": "odd", "message": message}}) for message in messages]
    return make_report(info(0, len(outputs)), NUMBERS, outputs)
