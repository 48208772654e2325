"""A worker with the cache: the same answers as without, each decoded once, over preemption, drafts and restarts."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from storage import cached_answers
from storage.cached_answers import CacheScope
from storage.models import ChoiceOutput, JobRow
from storage.session import Database
from tests.unit.worker.serving.test_runner import AT_END, Worker, submit

SCOPE = CacheScope("scope", "fp_1")
PROMPTS = ["the cat", "the dog", "the cat", "the cat", "the dog"]
WITHOUT_TIMES = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "token_ids", "logprobs", "prompt")


def answers(database: Database, job_id: str) -> list[tuple[Any, ...]]:
    """All of the answers of a job but where they come from."""
    columns = [getattr(ChoiceOutput, name) for name in (*WITHOUT_TIMES, "request_index", "choice_index", "numerics")]
    query = select(*columns).where(ChoiceOutput.job_id == job_id)
    with database.read() as session:
        rows = session.execute(query.order_by(ChoiceOutput.request_index, ChoiceOutput.choice_index))
        return [tuple(row) for row in rows]


def counts(database: Database, job_id: str) -> tuple[str, int, int]:
    with database.read() as session:
        query = select(JobRow.status, JobRow.requests_completed, JobRow.requests_cached)
        row = session.execute(query.where(JobRow.id == job_id)).one()
        return row.status, row.requests_completed, row.requests_cached


@pytest.mark.parametrize(
    ("sampling", "kv_tokens"),
    [({}, None), ({"temperature": 1.0, "seed": 7, "n": 2, "logprobs": 2, "echo": True}, None), ({}, 60)],
    ids=["greedy", "sampled", "preempted"],
)
def test_answers_with_the_cache_are_those_without(
    database: Database, sampling: dict[str, Any], kv_tokens: int | None
) -> None:
    submit(database, *PROMPTS, job_id="plain", **sampling)
    Worker(database, "a", interval_s=AT_END, numerics="fp_1").run()
    for job_id in ("first", "second"):
        submit(database, *PROMPTS, job_id=job_id, identities=PROMPTS, **sampling)
    worker = Worker(database, "b", interval_s=AT_END, kv_tokens=kv_tokens, scope=SCOPE)
    worker.run()
    assert answers(database, "first") == answers(database, "second") == answers(database, "plain")
    cached = [counts(database, job_id) for job_id in ("first", "second")]
    assert [one[:2] for one in cached] == [("completed", 5)] * 2
    assert sum(one[2] for one in cached) == 8, "two prompts, decoded once each"


def test_a_copy_is_published_as_one_text_and_ends_its_job(database: Database) -> None:
    for job_id in ("first", "second"):
        submit(database, "the cat", job_id=job_id, identities=["same"])
        worker = Worker(database, job_id, interval_s=AT_END, scope=SCOPE)
        worker.run()
    assert [(event.type, event.seq) for event in worker.events] == [
        ("started", 0),
        ("tokens", 1),
        ("finished", 2),
        ("job", 0),
    ]
    ((text, *_),) = answers(database, "first")
    assert "".join(piece.text for piece in worker.events[1].pieces) == worker.events[1].text == text
    assert worker.engine.stats["tokens"] == 0


def test_duplicates_of_a_request_that_moves_to_another_worker_take_its_answer(database: Database) -> None:
    submit(database, *["the cat"] * 4, identities=["same"] * 4)
    first = Worker(database, "a", scope=SCOPE)
    for _ in range(3):
        first.runner.run_once(notified=first.work_waits())
    first.runner.hand_back()
    Worker(database, "b", interval_s=AT_END, scope=SCOPE).run()
    assert counts(database, "batch_1") == ("completed", 4, 3)
    assert len(set(answers_of_texts(database))) == 1


def answers_of_texts(database: Database) -> list[tuple[Any, ...]]:
    return [(row[0], str(row[4])) for row in answers(database, "batch_1")]


def test_an_answer_that_cannot_be_copied_is_decoded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cached_answers, "copy_answers", broken)
    submit(database, *["the cat"] * 3, identities=["same"] * 3)
    Worker(database, "a", interval_s=AT_END, scope=SCOPE).run()
    assert counts(database, "batch_1") == ("completed", 3, 0)
