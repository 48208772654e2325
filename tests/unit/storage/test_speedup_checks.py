"""Speed-up checks in the database: their leases, their samples, and their results."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sqlalchemy import text, update

from storage import queries, speedup_checks
from storage.lease_recovery import MAX_LONE_CRASHES
from storage.models import JobRow
from storage.records import SpeedupCheckClaim, SpeedupCheckResult
from storage.session import Database
from tests.unit.storage.acts import cancel, claim, flush, record, whole

MODEL = "tiny"


def finish(database: Database, job_id: str = "job-1", requests: int = 3, compare_plain: int = 2) -> None:
    """Insert a job that requests a speed-up check, with all its outputs."""
    record(database, job_id, requests)
    with database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(compare_plain=compare_plain))
    for claimed in claim(database, limit=requests):
        flush(database, "w1", whole(claimed.lease, 1, 2))


def take(
    database: Database, *, model: str = MODEL, body_version: int = 9, lease_s: float = 30.0, worker: str = "w1"
) -> SpeedupCheckClaim | None:
    with database.write() as session:
        found = speedup_checks.is_due(session, model, body_version)
        claimed = speedup_checks.claim_check(session, model, body_version, lease_s, worker)
    assert found is (claimed is not None)
    return claimed


def write(database: Database, *rows: SpeedupCheckResult, worker: str = "w1", job_id: str = "job-1") -> None:
    with database.write() as session:
        speedup_checks.save_check(session, worker, job_id, rows)


def row(index: int, drafted_ms: float | None, plain_ms: float | None, *, same_text: bool = True) -> SpeedupCheckResult:
    return SpeedupCheckResult(index, 3, drafted_ms, plain_ms, 2.0, same_text)


def view(database: Database) -> Any:
    with database.read() as session:
        return session.execute(text("SELECT * FROM job_comparison")).mappings().one()


def test_a_completed_job_waits_for_its_check_with_its_outputs(database: Database) -> None:
    finish(database, requests=5, compare_plain=3)
    claimed = take(database)
    assert claimed is not None
    assert len({found.request_index for found in claimed.texts}) == 3
    assert {found.token_ids for found in claimed.texts} == {(0, 1, 2)}


def test_all_requests_of_a_small_job_are_checked(database: Database) -> None:
    finish(database, requests=2, compare_plain=100)
    claimed = take(database)
    assert claimed is not None
    assert [found.request_index for found in claimed.texts] == [0, 1]


def test_one_worker_at_a_time_holds_a_check(database: Database) -> None:
    finish(database)
    assert take(database) is not None
    assert take(database) is None
    with database.write() as session:
        speedup_checks.release_check(session, "job-1")
    assert take(database) is not None


def test_the_check_of_a_lost_worker_lapses_unless_it_is_renewed(database: Database) -> None:
    finish(database)
    assert take(database, lease_s=-1.0) is not None
    with database.write() as session:
        speedup_checks.renew_check(session, "job-1", 30.0)
    assert take(database) is None
    with database.write() as session:
        speedup_checks.renew_check(session, "job-1", -1.0)
    assert take(database) is not None


def lose(database: Database, workers: int) -> list[str]:
    """Let `workers` workers claim the check and die, observed; return the jobs whose checks failed."""
    given_up: list[str] = []
    for number in range(workers):
        assert take(database, worker=f"w{number}") is not None
        given_up += give_up(database, f"w{number}")
    return given_up


def give_up(database: Database, *dead: str) -> list[str]:
    with database.write() as session:
        return speedup_checks.fail_checks(session, dead)


def test_a_check_that_has_crashed_two_workers_ends_with_an_error_for_each_request(database: Database) -> None:
    finish(database, requests=3, compare_plain=2)
    assert lose(database, MAX_LONE_CRASHES) == ["job-1"]
    assert take(database) is None
    assert give_up(database, "w1") == []
    with database.read() as session:
        written = session.execute(text("SELECT worker_id, tokens, same_text, error_code FROM comparisons")).all()
        numbers = queries.job_stats(session, "job-1").comparison
    assert written == [("", 0, None, "poison")] * 2
    assert numbers is not None
    assert (numbers.done, numbers.requests, numbers.faults, numbers.error_code) == (True, 0, 0, "poison")
    assert numbers.error_message is not None
    assert "crashed twice" in numbers.error_message
    told = view(database)
    assert (told["requests"], told["given_up"], told["faults"], told["speedup"]) == (0, 2, 0, None)
    write(database, row(0, 10.0, 20.0))
    assert view(database)["requests"] == 0


def test_the_last_attempt_of_a_check_is_left_to_its_worker(database: Database) -> None:
    finish(database)
    lose(database, MAX_LONE_CRASHES - 1)
    assert give_up(database) == []
    assert take(database) is not None
    assert give_up(database) == []
    write(database, row(0, 10.0, 20.0))
    assert give_up(database) == []
    assert view(database)["given_up"] == 0


def test_released_attempts_do_not_count(database: Database) -> None:
    finish(database)
    for _ in range(3 * MAX_LONE_CRASHES):
        assert take(database) is not None
        with database.write() as session:
            speedup_checks.release_check(session, "job-1")
    lose(database, MAX_LONE_CRASHES)
    assert take(database) is None


def test_a_lapsed_check_is_claimed_again_and_counts_no_crash(database: Database) -> None:
    finish(database)
    for number in range(3 * MAX_LONE_CRASHES):
        assert take(database, lease_s=-1.0, worker=f"w{number}") is not None
        assert give_up(database, "another") == []
    assert give_up(database, f"w{3 * MAX_LONE_CRASHES - 1}") == []  # one observed crash
    assert take(database) is not None


def test_only_completed_jobs_with_readable_bodies_that_request_a_check_get_one(database: Database) -> None:
    finish(database, compare_plain=0)
    assert take(database) is None
    finish(database, "job-2")
    assert take(database, model="another") is None
    assert take(database, body_version=0) is None
    record(database, "job-3", 2)
    with database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == "job-3").values(compare_plain=2))
    cancel(database, "job-3")
    claimed = take(database)
    assert claimed is not None
    assert claimed.job_id == "job-2"
    write(database, job_id="job-2")
    assert take(database) is None


def test_the_first_finished_check_is_written_as_a_whole(database: Database) -> None:
    finish(database)
    write(database, row(0, 10.0, 20.0), row(1, 10.0, 20.0))
    write(database, row(0, 1.0, 1.0), row(2, 1.0, 1.0), worker="w2")
    with database.read() as session:
        written = session.execute(text("SELECT request_index, worker_id FROM comparisons ORDER BY 1")).all()
    assert written == [(0, "w1"), (1, "w1")]


def test_the_view_equals_the_statistics(database: Database) -> None:
    finish(database)
    write(database, row(0, 10.0, 20.0), row(1, 20.0, 30.0, same_text=False), row(2, None, None))
    with database.read() as session:
        numbers = queries.job_stats(session, "job-1").comparison
    told = view(database)
    assert numbers is not None
    assert (numbers.requests, numbers.faults) == (told["requests"], told["faults"]) == (3, 1)
    assert told["compared"] == 2
    assert numbers.speedup == pytest.approx(50 / 30) == told["speedup"]
    assert numbers.speedup_error == pytest.approx(math.sqrt(told["speedup_variance"]))
    assert numbers.speedup_error == pytest.approx(math.sqrt(2 * 2 * (20 - 10 * 50 / 30) ** 2) / 30)
    assert numbers.mean_batch_sequences == told["mean_batch_sequences"] == 2.0


def test_statistics_show_that_a_check_is_pending(database: Database) -> None:
    finish(database)
    with database.read() as session:
        numbers = queries.job_stats(session, "job-1").comparison
        everything = queries.total_stats(session).comparison
    assert numbers is not None
    assert (numbers.done, numbers.requests_asked, numbers.requests, numbers.speedup) == (False, 2, 0, None)
    assert everything is None


def test_a_cancelled_job_gets_no_check(database: Database) -> None:
    record(database, requests=2)
    with database.write() as session:
        session.execute(update(JobRow).values(compare_plain=2))
    cancel(database)
    with database.read() as session:
        numbers = queries.job_stats(session, "job-1").comparison
    assert numbers is not None
    assert (numbers.done, numbers.requests) == (True, 0)
