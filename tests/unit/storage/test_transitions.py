from __future__ import annotations

from collections import Counter

import pytest

from storage import event_log, transitions, writes
from storage.event_log import Cursor
from storage.records import RequestProgress
from storage.session import Database
from tests.factories import a_request
from tests.unit.storage.acts import (
    cancel,
    check_laws,
    claim,
    claim_one,
    everything,
    expire,
    flush,
    record,
    requests_of,
    tokens_of,
    view,
    whole,
)


def let_the_window_pass(database: Database, job_id: str = "job-1") -> None:
    with database.write() as session:
        session.connection().exec_driver_sql(f"UPDATE jobs SET expires_at = 1.0 WHERE id = '{job_id}'")


def test_a_job_without_running_requests_is_cancelled_at_once(database: Database) -> None:
    record(database, requests=3)

    assert cancel(database) == "cancelled"

    job = view(database)
    assert job.cancelling_at is not None
    assert {(row.status, row.error_code) for row in requests_of(database).values()} == {
        ("cancelled", "batch_cancelled")
    }
    assert (job.requests_completed, job.requests_failed) == (0, 0)
    check_laws(database)


def test_requests_finished_before_the_cancel_are_kept(database: Database) -> None:
    record(database, requests=2)
    flush(database, "w1", whole(claim_one(database).lease, 1, 2))

    assert cancel(database) == "cancelled"

    assert Counter(row.status for row in requests_of(database).values()) == {"completed": 1, "cancelled": 1}
    assert view(database).requests_completed == 1
    check_laws(database)


@pytest.mark.parametrize("ending", ["completed", "cancelled", "expired"])
def test_cancelling_a_job_that_has_ended_changes_nothing(database: Database, ending: str) -> None:
    record(database)
    if ending == "completed":
        flush(database, "w1", whole(claim_one(database).lease, 1))
    elif ending == "cancelled":
        cancel(database)
    else:
        let_the_window_pass(database)
        expire(database)
    before = everything(database)

    assert cancel(database) == ending
    assert everything(database) == before


def test_a_missing_job_cannot_be_cancelled(database: Database) -> None:
    assert cancel(database, "nowhere") is None


def test_cancelling_again_waits_like_before(database: Database) -> None:
    record(database)
    claim_one(database)
    assert cancel(database) == "cancelling"
    since = view(database).cancelling_at

    assert cancel(database) == "cancelling"
    assert view(database).cancelling_at == since


def test_a_cancelled_job_ends_although_its_worker_died(database: Database) -> None:
    record(database)
    lease = claim_one(database).lease
    cancel(database)
    assert expire(database) == []  # the worker may still be alive

    with database.write() as session:
        session.connection().exec_driver_sql("UPDATE requests SET lease_expires_at = 1.0")
    assert expire(database) == [("job-1", "cancelled")]

    assert flush(database, "w1", whole(lease, 1)).lost == {lease.key}
    check_laws(database)


def test_an_overdue_job_expires_with_all_that_is_unfinished(database: Database) -> None:
    record(database, requests=3)
    record(database, "in time")
    done, running = claim(database, limit=3)[::2]
    done, running = sorted([done, running], key=lambda c: c.lease.key)
    leases = {c.lease.job_id: c.lease for c in (done, running)}
    flush(database, "w1", whole(leases["job-1"], 1, 2))
    let_the_window_pass(database)

    assert expire(database) == [("job-1", "expired")]
    assert expire(database) == []

    rows = requests_of(database).values()
    assert Counter(row.status for row in rows) == {"completed": 1, "expired": 2}
    assert {row.error_code for row in rows if row.status == "expired"} == {"batch_expired"}
    assert view(database, "in time").status == "in_progress"
    check_laws(database)


def test_text_of_an_expired_request_is_kept_and_no_longer_grows(database: Database) -> None:
    record(database)
    lease = claim_one(database).lease
    flush(database, "w1", RequestProgress(lease, (tokens_of(1, 1, 2),)))
    let_the_window_pass(database)
    expire(database)
    before = everything(database)

    assert flush(database, "w1", RequestProgress(lease, (tokens_of(2, 3),))).lost == {lease.key}

    assert everything(database) == before
    assert view(database).completion_tokens == 3


def test_only_jobs_without_open_requests_end(database: Database) -> None:
    record(database)
    with database.write() as session:
        assert writes.end_finished_jobs(session, ["job-1", "nowhere"]) == []
        assert writes.end_finished_jobs(session, []) == []
    assert view(database).status == "in_progress"


def end_all(database: Database) -> int:
    """End requests chunk by chunk; return the number of chunks."""
    pieces = 0
    more = True
    while more:
        with database.write() as session:
            more = writes.end_jobs(session).more
        pieces += 1
        check_laws(database)
    return pieces


def events_of(database: Database, job_id: str = "job-1") -> list[int]:
    """The requests whose failure a reader receives, in order."""
    cursor, failed, complete = Cursor(), [], False
    while not complete:
        with database.read() as session:
            page = event_log.read(session, job_id, cursor, 100)
        failed += [event.request_index for event in page.events if event.kind == "failed"]
        cursor, complete = page.cursor, page.complete
    return failed


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "_ROWS_AT_ONCE", 50)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_a_large_job_ends_in_chunks_and_each_failure_is_delivered_once(database: Database, ending: str) -> None:
    record(database, requests=170)
    first, second = claim(database, limit=2)
    flush(database, "w1", whole(first.lease, 1))
    if ending == "cancelled":
        assert cancel(database) == "cancelling"
    else:
        let_the_window_pass(database)
    assert claim(database, "w2") == []

    assert end_all(database) == (3 if ending == "cancelled" else 4)
    assert view(database).status == ("cancelling" if ending == "cancelled" else "expired")  # its worker still has one
    flush(database, "w1", held=[second.lease])

    assert view(database).status == ending
    rows = requests_of(database).values()
    assert Counter(row.status for row in rows) == {"completed": 1, ending: 169}
    assert {row.error_code for row in rows if row.status == ending} == {f"batch_{ending}"}
    assert sorted(events_of(database)) == sorted(set(range(170)) - {first.lease.request_index})


@pytest.mark.usefixtures("small_chunks")
def test_requests_whose_deadlines_end_together_fail_in_chunks(database: Database) -> None:
    record(database, requests=[a_request(f"r{n}", timeout_s=-1.0) for n in range(110)])
    failed: list[str] = []
    more = True
    while more:
        with database.write() as session:
            ended = writes.expire_requests(session)
        failed += [request.custom_id for request in ended.failed]
        more = ended.more
    assert failed == [f"r{n}" for n in range(110)]
    assert ended.jobs == (("job-1", "completed"),)
    check_laws(database)
