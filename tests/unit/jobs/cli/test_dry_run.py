from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from jobs.client.results import JobCheck
from storage import writes
from storage.models import JobRow
from storage.session import Database
from tests.factories import a_key, a_worker_card
from tests.unit.jobs.cli.test_cli import Run, run

__all__ = ["run"]


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.cli.jobs.prompt_counter", lambda: None)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    lines = ['"What is the capital of France?"', "", '{"prompt": "Hi", "max_tokens": 7, "n": 3}', '{"prompt": ""}']
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*lines, '{"prompt": "x", "top_p": 9, "custom_id": "seven"}', "not json"]))
    return str(path)


def stored(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(JobRow)) or 0


def test_a_dry_run_names_line_and_field_of_what_would_be_refused_and_stores_nothing(
    run: Run, prompts: str, database: Database
) -> None:
    check: dict[str, Any] = json.loads(run("submit", prompts, "--dry-run", "--max-tokens", "5", "--json", status=1))
    assert check["request_counts"] == {"total": 5, "accepted": 2, "refused": 3}
    places = [(one["index"], one["line"], one["custom_id"], one["param"]) for one in check["refused"]]
    assert places == [(2, 4, "request-2", "prompt"), (3, 5, "seven", "top_p"), (4, 6, "request-4", None)]
    assert check["max_output_tokens"] == 5 + 3 * 7
    assert check["requests_without_max_tokens"] == 0
    assert stored(database) == 0
    told = run("submit", prompts, "--dry-run", "--max-tokens", "5", status=1)
    assert "line 5, top_p" in told
    assert "estimated" in told


def test_a_dry_run_says_what_the_submission_then_does(run: Run, prompts: str, database: Database) -> None:
    check = json.loads(run("submit", prompts, "--dry-run", "--json", status=1))
    job = json.loads(run("submit", prompts, "--json"))
    assert job["request_counts"]["failed"] == check["request_counts"]["refused"]
    refused = [json.loads(line) for line in run("results", "--failed", "--json").splitlines()]
    assert [one["error"]["message"] for one in refused] == [one["message"] for one in check["refused"]]
    with database.read() as session:
        asked = session.scalar(select(JobRow.tokens_asked))
    assert asked == check["prompt_tokens"] + check["max_output_tokens"]


def test_texts_without_max_tokens_are_bounded_by_the_context(run: Run, database: Database) -> None:
    with database.write() as session:
        writes.register_worker(session, a_worker_card(target="tiny", context_tokens=64))
    check = json.loads(run("submit", "-", "--dry-run", "--json", stdin='"abcdefgh"\n'))
    assert check["context_tokens"] == 64
    assert check["prompt_tokens"] + check["max_output_tokens"] == 64
    assert check["requests_without_max_tokens"] == 1


def test_what_refuses_the_whole_job_ends_a_dry_run_with_its_sentence(run: Run) -> None:
    twice = '{"prompt": "x", "custom_id": "a"}\n' * 2
    with pytest.raises(Exception, match="line 2"):
        run("submit", "-", "--dry-run", stdin=twice)


def test_a_limit_that_would_refuse_the_job_now_is_named(
    run: Run, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = a_key(database, requests_queued=1)
    monkeypatch.setenv("BASIC_API_KEY", headers["authorization"].removeprefix("Bearer "))
    check = json.loads(run("submit", "-", "--dry-run", "--json", stdin='"one"\n"two"\n', status=1))
    assert "1 requests in the queue" in check["limit"]
    assert stored(database) == 0


def test_a_tokenizer_at_hand_counts_the_prompts_of_the_file(
    run: Run, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def count(lines: Any, parameters: Any, check: JobCheck) -> JobCheck:
        seen.append(lines.read())
        assert parameters["max_tokens"] == 5
        return check.model_copy(update={"prompt_tokens": 1234, "prompt_tokens_source": "tokenizer"})

    monkeypatch.setattr("jobs.cli.jobs.prompt_counter", lambda: count)
    told = run("submit", prompts, "--dry-run", "--max-tokens", "5", status=1)
    assert "1,234 (counted)" in told
    assert seen == [Path(prompts).read_bytes()]
