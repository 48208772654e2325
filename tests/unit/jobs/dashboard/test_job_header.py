"""What the head of a job's page says and reads."""

from __future__ import annotations

import pytest

from jobs.dashboard.delete_dialog import erased_parts
from jobs.dashboard.job_header import pause_text, read_labels
from jobs.errors import InvalidValue
from storage.budgets import BY_SECONDS, BY_TOKENS
from storage.pausing import BY_USER
from storage.pilots import BY_PILOT
from storage.queries import JobView


def job(**fields: object) -> JobView:
    values = dict.fromkeys(JobView.__dataclass_fields__) | {"id": "batch_1", "status": "paused"}
    return JobView(**values | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pause_reason": BY_TOKENS, "budget_tokens": 5_000}, "5,000 tokens is spent. Raise it with Edit"),
        ({"pause_reason": BY_SECONDS, "budget_s": 90.0}, "90 seconds is spent. Raise it with Edit"),
        ({"pause_reason": BY_PILOT}, "Resume runs the rest"),
    ],
)
def test_a_job_that_the_service_paused_says_why_and_what_to_do(fields: dict[str, object], sentence: str) -> None:
    assert sentence in pause_text(job(**fields))


def test_a_job_that_its_caller_paused_or_that_runs_says_nothing() -> None:
    assert pause_text(job(pause_reason=BY_USER)) == ""
    assert pause_text(job(status="in_progress", pause_reason=BY_PILOT)) == ""


def test_the_question_before_a_deletion_names_what_is_left_to_erase() -> None:
    counts: dict[str, object] = {"requests_total": 1_200, "requests_completed": 1, "requests_failed": 2}
    running = list(erased_parts(job(status="in_progress", **counts)))
    assert running[:3] == [
        "1,200 prompts",
        "1 answer and the texts so far: text, tokens, log-probabilities, draft trees",
        "2 errors",
    ]
    old = list(erased_parts(job(status="completed", prompts_deleted_at=1.0, outputs_deleted_at=1.0, **counts)))
    assert old == running[2:], "prompts and answers were erased before"


def test_labels_are_lines_of_key_and_value() -> None:
    assert read_labels(" team = search \n\nformula=a=b\nempty=") == {"team": "search", "formula": "a=b", "empty": ""}
    for line in ("team", "=search"):
        with pytest.raises(InvalidValue, match="write key=value"):
            read_labels(line)
