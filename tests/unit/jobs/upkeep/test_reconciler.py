"""Rounds of the reconciler on a real database, with a real dead process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest
from sqlalchemy import text

from jobs.messages import PartialEvent
from jobs.process_identity import identity
from jobs.upkeep.reconciler import Reconciler
from storage import leases, queries, transitions, writes
from storage.lease_recovery import MAX_LONE_CRASHES, mark_lost
from storage.session import DATABASE_UNAVAILABLE, Database
from tests.factories import a_request, a_worker_card
from tests.unit.storage.acts import cancel, claim_one, record, requests_of, view
from tests.unit.storage.test_speedup_checks import finish, take


class Harness:
    """A reconciler with the events and notifications that it sends."""

    def __init__(self, database: Database, lease_s: float = 0.0) -> None:
        self.events: list[PartialEvent] = []
        self.notified: list[tuple[str, str]] = []

        def notify(job_id: str, model: str) -> None:
            self.notified.append((job_id, model))

        def publish(events: Sequence[PartialEvent]) -> None:
            self.events.extend(events)

        self.reconciler = Reconciler(database, publish, notify, lease_s=lease_s)


def a_dead_worker(database: Database, worker: str) -> None:
    """Register a worker whose process has been killed."""
    process = subprocess.Popen(["sleep", "60"])
    card = a_worker_card(id=worker, process=identity(process.pid))
    process.kill()
    process.wait()
    with database.write() as session:
        writes.register_worker(session, card)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which processes there are")
def test_requests_of_a_killed_local_worker_are_requeued_at_once(database: Database) -> None:
    record(database)
    a_dead_worker(database, "w1")
    claim_one(database, "w1")  # for 30 s
    harness = Harness(database, lease_s=30.0)

    assert harness.reconciler.run_once()

    assert requests_of(database)[0].status == "queued"
    assert harness.notified == [("job-1", "tiny")]
    with database.read() as session:
        assert [w.lost_at is not None for w in queries.workers(session)] == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which processes there are")
def test_a_reconciler_that_does_not_lead_sees_dead_workers_of_its_machine(database: Database) -> None:
    elsewhere, here = Harness(database), Harness(database, lease_s=30.0)
    elsewhere.reconciler.leadership.name = "a process of another machine"
    assert elsewhere.reconciler.run_once()
    record(database)
    a_dead_worker(database, "w1")
    claim_one(database, "w1")

    assert not here.reconciler.run_once()

    assert requests_of(database)[0].lone_crashes == 1
    assert here.notified == [("job-1", "tiny")]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which processes there are")
def test_a_lost_worker_that_died_counts_as_a_crash(database: Database) -> None:
    record(database)
    a_dead_worker(database, "w1")
    claim_one(database, "w1")
    with database.write() as session:
        mark_lost(session, ["w1"])

    Harness(database, lease_s=30.0).reconciler.run_once()

    assert requests_of(database)[0].lone_crashes == 1


def test_a_restarted_container_reveals_that_its_worker_died(database: Database) -> None:
    record(database)
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id="w1", hostname="pod-1", process="boot/pid:[1]/7/100"))
    claim_one(database, "w1")
    harness = Harness(database, lease_s=30.0)
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id="w0", hostname="pod-2", process="boot/pid:[2]/7/200"))
    harness.reconciler.run_once()
    assert requests_of(database)[0].status == "running"
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id="w2", hostname="pod-1", process="boot/pid:[3]/7/300"))

    harness.reconciler.run_once()

    assert (requests_of(database)[0].status, requests_of(database)[0].lone_crashes) == ("queued", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which processes there are")
def test_a_step_that_outlasts_its_lease_again_and_again_fails_no_request(database: Database) -> None:
    record(database, requests=4)
    harness = Harness(database, lease_s=0.0)
    harness.reconciler.run_once()  # from this round on their owners could renew
    for number in range(12):
        with database.write() as session:
            writes.register_worker(session, a_worker_card(id=f"w{number}", process=identity()))
            claimed = leases.claim(session, f"w{number}", "tiny", 4, lease_s=-1.0)
        assert claimed
        harness.reconciler.run_once()

    rows = requests_of(database).values()
    assert {(row.status, row.error_code, row.lone_crashes) for row in rows} == {("queued", None, 0)}


def test_lapsed_leases_wait_until_their_owners_could_have_renewed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.upkeep.reconciler.time.monotonic", lambda: now)
    record(database)
    claim_one(database, "w1", lease_s=-1)
    harness = Harness(database, lease_s=20.0)

    harness.reconciler.run_once()
    now += 19
    harness.reconciler.run_once()
    assert requests_of(database)[0].status == "running"
    now += 1
    harness.reconciler.run_once()
    assert requests_of(database)[0].status == "queued"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which processes there are")
def test_a_speed_up_check_that_crashes_its_workers_is_given_up(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    finish(database)
    harness = Harness(database, lease_s=20.0)

    for number in range(MAX_LONE_CRASHES):
        assert "speed-up check of job job-1" not in caplog.text
        a_dead_worker(database, f"w{number}")
        assert take(database, worker=f"w{number}") is not None
        harness.reconciler.run_once()
    assert "speed-up check of job job-1 crashed its workers" in caplog.text
    with database.read() as session:
        assert set(session.scalars(text("SELECT error_code FROM comparisons"))) == {"poison"}


def test_after_an_outage_owners_have_a_full_lease_to_renew(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.upkeep.reconciler.time.monotonic", lambda: now)
    harness = Harness(database, lease_s=20.0)
    harness.reconciler.run_once()
    now += 100
    with database.write() as session:
        session.execute(text("ALTER TABLE elections RENAME TO away"))
    with pytest.raises(DATABASE_UNAVAILABLE):
        harness.reconciler.run_once()
    with database.write() as session:
        session.execute(text("ALTER TABLE away RENAME TO elections"))
    record(database)
    claim_one(database, "w1", lease_s=-1)

    harness.reconciler.run_once()
    now += 19
    harness.reconciler.run_once()
    assert requests_of(database)[0].status == "running"
    now += 1
    harness.reconciler.run_once()
    assert requests_of(database)[0].status == "queued"


def test_a_late_request_fails_with_its_event_and_ends_its_job(database: Database) -> None:
    record(database, requests=[a_request("late", timeout_s=-1.0)])
    harness = Harness(database)

    harness.reconciler.run_once()

    failed, ended = harness.events
    assert (failed.type, failed.request, failed.seq) == ("failed", "late", 0)
    assert failed.error is not None
    assert failed.error["code"] == "deadline_exceeded"
    assert (ended.type, ended.status) == ("job", "completed")
    assert view(database).requests_failed == 1


def test_one_round_ends_a_large_cancelled_job_and_publishes_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transitions, "_ROWS_AT_ONCE", 50)
    record(database, requests=200)
    assert cancel(database) == "cancelling"
    harness = Harness(database)

    harness.reconciler.run_once()

    assert [(event.type, event.status) for event in harness.events] == [("job", "cancelled")]
    assert {row.status for row in requests_of(database).values()} == {"cancelled"}


def test_other_transactions_run_between_the_batches_of_a_round(database: Database) -> None:
    record(database, requests=3_000)
    cancel(database)
    harness = Harness(database)

    def go_on() -> None:
        while view(database).status == "cancelling":
            harness.reconciler.run_once()

    reconciling = threading.Thread(target=go_on)
    reconciling.start()
    recorded = 0
    while reconciling.is_alive():
        record(database, f"other-{recorded}")
        recorded += 1
    assert recorded > 6  # there are six pieces


def test_one_of_two_reconcilers_leads(database: Database) -> None:
    first, second = Harness(database), Harness(database)
    second.reconciler.leadership.name = "another process"

    assert first.reconciler.run_once()
    assert not second.reconciler.run_once()
    first.reconciler.stop()
    assert second.reconciler.run_once()
