"""Which requests a claim takes: by class, by age, and within the concurrency limit of their job."""

from __future__ import annotations

from typing import Any

from storage import leases
from storage.fair_share import Ageing
from storage.priorities import Priority, priority_of
from storage.records import Claim
from storage.session import Database
from tests.unit.storage.acts import (
    cancel,
    check_laws,
    claim,
    flush,
    reclaimed,
    record,
    release,
    requests_of,
    whole,
)
from tests.unit.storage.test_together import run_all


def record_in(database: Database, priority: Priority, job_id: str = "", requests: int = 3, **fields: Any) -> None:
    record(database, job_id or priority.value, requests, priority_class=priority.rank, **fields)


def take(database: Database, limit: int, worker: str = "w1", ageing: Ageing | None = None) -> list[str]:
    """Return the jobs of the requests that a claim takes, in its order."""
    with database.write() as session:
        claims = leases.claim(session, worker, "tiny", limit, 30.0, ageing=ageing)
    return [claimed.lease.job_id for claimed in claims]


def running(database: Database, job_id: str) -> int:
    return sum(row.status == "running" for row in requests_of(database, job_id).values())


def test_a_stored_rank_is_the_class_that_it_was_made_of() -> None:
    assert [priority_of(priority.rank) for priority in Priority] == list(Priority)
    assert sorted(Priority, key=lambda priority: -priority.rank) == ["high", "normal", "low"]


def test_a_claim_takes_high_before_normal_before_low_whatever_the_owner(database: Database) -> None:
    record_in(database, Priority.LOW, api_key_id="a")
    record_in(database, Priority.NORMAL, api_key_id="a")
    record_in(database, Priority.HIGH, api_key_id="b")

    assert [take(database, 2), take(database, 2)] == [["high", "high"], ["high", "normal"]]
    assert take(database, 9) == ["normal", "normal", "low", "low", "low"]
    check_laws(database)


def test_interactive_requests_come_before_jobs_of_the_highest_class(database: Database) -> None:
    record_in(database, Priority.HIGH)
    record(database, "chat", priority=1)

    assert take(database, 2) == ["chat", "high"]


def test_no_class_starves_under_a_stream_of_high_jobs(database: Database) -> None:
    record_in(database, Priority.LOW, requests=3)
    record_in(database, Priority.NORMAL, requests=3)
    ageing, claimed = Ageing(4), []
    for number in range(16):
        record_in(database, Priority.HIGH, f"high-{number}", requests=2)
        claimed += [job.partition("-")[0] for job in take(database, 1, ageing=ageing)]

    later = ["high"] * 3 + ["normal", "low"]
    assert claimed == ["high", *later, *later, *later]


def test_a_job_never_runs_more_requests_than_its_limit_over_several_workers(database: Database) -> None:
    record(database, requests=6, max_concurrent=2)
    first = claim(database, "w1", limit=1)
    second = claim(database, "w2", limit=5)
    assert (len(first), len(second)) == (1, 1)
    assert claim(database, "w3", limit=5) == []

    flush(database, "w1", whole(first[0].lease, 2))
    (third,) = claim(database, "w3", limit=5)

    assert (third.lease.request_index, third.max_concurrent) == (2, 2)
    check_laws(database)


def test_a_job_at_its_limit_leaves_the_slots_to_others(database: Database) -> None:
    record_in(database, Priority.HIGH, requests=6, max_concurrent=1)
    record_in(database, Priority.LOW, requests=6)

    assert take(database, 4) == ["high", "low", "low", "low"]
    assert take(database, 2) == ["low", "low"]


def test_workers_that_claim_at_once_hold_the_limit(database: Database) -> None:
    for number in range(4):
        job_id = f"job-{number}"
        record(database, job_id, 8, max_concurrent=3)
        claimed: list[Claim] = []

        def work(worker: str, claimed: list[Claim] = claimed) -> None:
            claimed += claim(database, worker, limit=2)

        assert run_all(*(lambda w=f"w{n}": work(w) for n in range(4))) == []
        assert len(claimed) <= 3
        assert running(database, job_id) == len(claimed)
        cancel(database, job_id)
    check_laws(database)


def test_a_lapsed_request_counts_until_it_is_requeued(database: Database) -> None:
    """Its worker may only be slow, and still decode it."""
    record(database, requests=3, max_concurrent=1)
    claim(database, "w1", lease_s=-1)
    with database.write() as session:
        assert leases.claim(session, "w2", "tiny", 5, 30.0) == []

    reclaimed(database)
    assert len(claim(database, "w2", limit=5)) == 1


def test_suspects_of_a_crash_hold_the_limit_too(database: Database) -> None:
    record(database, requests=4, max_concurrent=2)
    claim(database, "w1", limit=2)
    reclaimed(database, "w1")  # two suspects, each in a group of its own
    first = claim(database, "w2", limit=4)
    second = claim(database, "w3", limit=4)

    assert [len(first), len(second)] == [1, 1]
    assert claim(database, "w4", limit=4) == []
    release(database, "w2", first[0].lease)
    assert len(claim(database, "w4", limit=4)) == 1
