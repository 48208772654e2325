from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import text

from storage import leases, queries, writes
from storage.budgets import spent_budget
from storage.dialect import database_now
from storage.pausing import pause_job, resume_job
from storage.pilots import draw_pilot, read_pilot
from storage.queries import JobView
from storage.records import Claim, RequestFailure, RequestProgress
from storage.session import Database
from storage.transitions import end_finished_jobs, fail_requests
from tests.factories import (
    a_checkpoint,
    a_finished_choice,
    a_job,
    a_request,
    a_worker_card,
    some_requests,
    some_steps,
)


def store(database: Database, requests: int, pilot: int | None = None, **fields: Any) -> None:
    with database.write() as session:
        writes.insert_job(session, a_job(**fields), some_requests(requests))
        if pilot is not None:
            draw_pilot(session, "job-1", pilot, seed=0)


def claimed(database: Database, limit: int = 1_000) -> list[Claim]:
    with database.write() as session:
        return leases.claim(session, "w", "tiny", limit, 30.0)


def flushed(database: Database, claims: Sequence[Claim], *, tokens: int = 3, ends: bool = True) -> frozenset[object]:
    """Play the worker: commit some tokens of each request, and end it; return the requests that it must give back."""
    steps = some_steps(*[1] * tokens)
    progress = [
        RequestProgress(
            claim.lease,
            checkpoints=(a_checkpoint(seq=1, token_ids=tuple(range(tokens)), accepted=(False,) * tokens, steps=steps),),
            finished=(a_finished_choice(last_seq=2, completion_tokens=tokens),) if ends else (),
            ends=ends,
        )
        for claim in claims
    ]
    with database.write() as session:
        return writes.flush(session, "w", 30.0, progress, [claim.lease for claim in claims]).returned


def job(database: Database) -> JobView:
    with database.read() as session:
        found = queries.job(session, "job-1")
    assert found is not None
    return found


def resumed(database: Database) -> None:
    with database.write() as session:
        assert resume_job(session, "job-1")


def test_a_pilot_is_spread_over_the_job_and_the_same_seed_draws_the_same(database: Database) -> None:
    store(database, 100, pilot=10)
    indexes = sorted(claim.lease.request_index for claim in claimed(database))
    assert [index // 10 for index in indexes] == list(range(10)), "one of each tenth"
    with database.write() as session:
        writes.insert_job(session, a_job("job-2"), some_requests(100))
        draw_pilot(session, "job-2", 10, seed=0)
    assert sorted(claim.lease.request_index for claim in claimed(database)) == indexes


def test_the_job_pauses_after_its_pilot_and_then_runs_each_other_request_once(database: Database) -> None:
    store(database, 40, pilot=4)
    first = claimed(database)
    assert len(first) == 4
    flushed(database, first[:3])
    assert job(database).status == "in_progress"
    flushed(database, first[3:])
    assert (job(database).status, job(database).pause_reason) == ("paused", "pilot")
    assert claimed(database) == []
    resumed(database)
    rest = claimed(database)
    assert len({claim.lease.key for claim in (*first, *rest)}) == 40
    flushed(database, rest)
    assert (job(database).status, job(database).requests_completed) == ("completed", 40)


def test_a_job_that_is_no_larger_than_its_pilot_runs_as_a_whole(database: Database) -> None:
    store(database, 5, pilot=50)
    flushed(database, claimed(database))
    assert job(database).status == "completed"


def test_a_pilot_that_was_paused_goes_on_as_a_pilot(database: Database) -> None:
    store(database, 40, pilot=4)
    with database.write() as session:
        assert pause_job(session, "job-1")
    resumed(database)
    assert len(claimed(database)) == 4


def test_a_pilot_that_ends_during_another_pause_holds_the_job_after_it(database: Database) -> None:
    store(database, 40, pilot=1)
    only = claimed(database)
    with database.write() as session:
        assert pause_job(session, "job-1")
    flushed(database, only)
    resumed(database)
    assert (job(database).status, job(database).pause_reason) == ("paused", "pilot")
    resumed(database)
    assert len(claimed(database)) == 39


@pytest.mark.parametrize(("requests", "drawn"), [(10, 10), (100, 16), (120, 30), (400, 62), (8_000, 80)])
def test_a_pilot_is_a_hundredth_or_a_batch_of_the_workers(database: Database, requests: int, drawn: int) -> None:
    at_once = 62 if requests > 100 else 0
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id="w", target="tiny"))
        writes.update_load(session, "w", {"max_sequences": at_once + 2, "reserved_sequences": 2})
        writes.insert_job(session, a_job(), some_requests(requests))
        assert draw_pilot(session, "job-1", None, seed=0) == drawn


def test_a_request_whose_prompt_came_before_repeats_it_whatever_else_differs(database: Database) -> None:
    prompts = ["a", "a", "b", "c", "b", "c", "d"]
    bodies = [{"prompt": prompt, "sampling": {"seed": seed}} for seed, prompt in enumerate(prompts)]
    chats = [{"messages": [{"role": "user", "content": "a"}], "sampling": {}}] * 2
    with database.write() as session:
        requests = [a_request(f"request-{n}", body=body) for n, body in enumerate([*bodies, *chats])]
        writes.insert_job(session, a_job(), requests)
        draw_pilot(session, "job-1", 9, seed=0)
        session.execute(text("DELETE FROM pilot_requests WHERE request_index > 2"))
    flushed(database, claimed(database))
    with database.read() as session:
        record = read_pilot(session, "job-1")
    assert record is not None
    assert [output.repeats for output in record.outputs] == [False, True, False]
    assert [request.repeats for request in record.waiting] == [False, True, True, False, False, True]


def test_a_job_whose_pilot_runs_takes_no_turn_of_another_job(database: Database) -> None:
    store(database, 40, pilot=4)
    assert len(claimed(database)) == 4
    with database.write() as session:
        writes.insert_job(session, a_job("job-2"), some_requests(8))
    assert [claim.lease.job_id for _ in range(8) for claim in claimed(database, limit=1)] == ["job-2"] * 8


def test_a_pilot_whose_last_request_fails_at_its_deadline_has_ended(database: Database) -> None:
    store(database, 40, pilot=1)
    (only,) = claimed(database)
    with database.write() as session:
        fail_requests(session, [only.lease.key], RequestFailure("x", "y"), database_now(session))
        end_finished_jobs(session, ["job-1"])
    assert job(database).pause_reason == "pilot"


def test_the_record_of_a_pilot_has_its_lengths_its_steps_and_what_waits(database: Database) -> None:
    store(database, 40, pilot=4)
    flushed(database, claimed(database), tokens=3)
    with database.read() as session:
        record = read_pilot(session, "job-1")
    assert record is not None
    assert (record.requests, record.open, len(record.waiting)) == (4, 0, 36)
    assert [output.completion_tokens for output in record.outputs] == [3] * 4
    assert sum(step.rows for step in record.steps) == 4 * 2
    assert sum(len(step.first_tokens_of) for step in record.steps) == 4
    assert {request.texts for request in record.waiting} == {1}


def test_a_job_without_a_pilot_has_no_record_of_one(database: Database) -> None:
    store(database, 2)
    with database.read() as session:
        assert read_pilot(session, "job-1") is None


@pytest.mark.parametrize(
    ("budget", "reason"), [({"budget_tokens": 9}, "budget_tokens"), ({"budget_s": 1e-9}, "budget_seconds")]
)
def test_a_job_that_has_spent_its_budget_pauses_and_gives_its_running_requests_back(
    database: Database, budget: dict[str, Any], reason: str
) -> None:
    store(database, 5, **budget)
    claims = claimed(database)
    assert not flushed(database, claims[:3], tokens=3, ends=False)
    assert (job(database).status, job(database).pause_reason) == ("paused", reason)
    assert flushed(database, claims, tokens=3, ends=False) == {claim.lease.key for claim in claims}
    with database.write() as session:
        assert spent_budget(session, "job-1", database_now(session)) == reason
        session.execute(text("UPDATE jobs SET budget_tokens = NULL, budget_s = NULL"))
    resumed(database)
    again = claimed(database)
    assert {claim.lease.key for claim in again} == {claim.lease.key for claim in claims}
    assert all(claim.checkpoints for claim in again), "they continue from the tokens that they had"
    assert all(claim.attempts == 1 for claim in again)


def test_a_budget_that_lasts_changes_nothing(database: Database) -> None:
    store(database, 3, budget_tokens=10_000, budget_s=10_000.0)
    flushed(database, claimed(database))
    assert job(database).status == "completed"


def test_pauses_do_not_count_as_time_of_the_job(database: Database) -> None:
    store(database, 3, budget_s=1e6)
    claimed(database)
    with database.write() as session:
        pause_job(session, "job-1")
        session.execute(text("UPDATE jobs SET paused_at = paused_at - 50, started_at = started_at - 60"))
    resumed(database)
    assert job(database).paused_s == pytest.approx(50, abs=5)
