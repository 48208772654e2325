from __future__ import annotations

from dataclasses import replace

import pytest

from storage import queries, writes
from storage.dialect import insert_many
from storage.models import PackedSteps
from storage.records import NewRequest, RequestFailure
from storage.session import DATABASE_UNAVAILABLE, Database
from tests.factories import a_job, a_request, a_worker_card, some_requests
from tests.unit.storage.acts import check_laws, claim, record, requests_of, view


def rejected(custom_id: str = "bad") -> NewRequest:
    return NewRequest(
        custom_id, failure=RequestFailure("invalid_value", "line 2, max_tokens: must be at least 1", "max_tokens")
    )


def test_a_new_job_is_in_progress_with_its_requests_queued(database: Database) -> None:
    recorded = record(database, requests=3, metadata={"team": "a"}, window_s=60.0)

    job = view(database)
    assert (recorded.job_id, recorded.created, recorded.conflict) == ("job-1", True, False)
    assert (job.status, job.requests_total, job.metadata) == ("in_progress", 3, {"team": "a"})
    assert job.started_at is None
    assert job.expires_at - job.created_at == pytest.approx(60.0)
    assert [row.status for row in requests_of(database).values()] == ["queued"] * 3
    check_laws(database)


@pytest.mark.parametrize("size_bytes", [0, 10_000])
def test_a_job_of_more_requests_than_one_insert_holds_is_stored_whole(database: Database, size_bytes: int) -> None:
    requests = (replace(a_request(f"r{index}"), size_bytes=size_bytes) for index in range(2_500))
    with database.write() as session:
        writes.insert_job(session, a_job(), requests)

    rows = requests_of(database)
    assert view(database).requests_total == 2_500
    assert [rows[index].custom_id for index in (0, 1_000, 2_499)] == ["r0", "r1000", "r2499"]


def test_rejected_requests_are_stored_as_failed_and_the_others_run(database: Database) -> None:
    record(database, requests=[a_request("good"), rejected(), a_request("good too")])

    job, row = view(database), requests_of(database)[1]
    assert (job.status, job.requests_total, job.requests_failed) == ("in_progress", 3, 1)
    assert (row.status, row.error_code, row.error_param, row.error_status_code) == (
        "failed",
        "invalid_value",
        "max_tokens",
        400,
    )
    assert {claimed.custom_id for claimed in claim(database, limit=9)} == {"good", "good too"}
    check_laws(database)


def test_a_job_whose_requests_are_all_rejected_ends_at_once(database: Database) -> None:
    record(database, requests=[rejected("a"), rejected("b")])

    job = view(database)
    assert (job.status, job.requests_failed, job.requests_completed) == ("completed", 2, 0)
    assert claim(database) == []
    check_laws(database)


@pytest.mark.parametrize("api_key_id", [None, "key-1"])
def test_the_same_submission_again_finds_the_first_job(database: Database, api_key_id: str | None) -> None:
    same = {"api_key_id": api_key_id, "idempotency_key": "once", "body_sha256": "aa"}
    record(database, "first", 2, **same)

    again = record(database, "second", 2, **same)

    assert (again.job_id, again.created, again.conflict) == ("first", False, False)
    with database.read() as session:
        assert [job.id for job in queries.jobs(session, 10).jobs] == ["first"]


def test_a_used_key_with_another_body_is_a_conflict(database: Database) -> None:
    record(database, "first", idempotency_key="once", body_sha256="aa")

    again = record(database, "second", idempotency_key="once", body_sha256="bb")

    assert (again.job_id, again.created, again.conflict) == ("first", False, True)


def test_idempotency_keys_of_two_owners_are_independent(database: Database) -> None:
    record(database, "first", idempotency_key="once", api_key_id="key-1")

    assert record(database, "second", idempotency_key="once", api_key_id="key-2").created
    assert record(database, "third", idempotency_key="once").created


def test_jobs_without_a_key_are_all_stored(database: Database) -> None:
    assert [record(database, job_id).created for job_id in ("a", "b")] == [True, True]


def test_the_same_id_without_a_key_adds_nothing(database: Database) -> None:
    record(database, "other")
    record(database, "job-1", 2)

    assert record(database, "job-1", 5) == writes.InsertedJob("job-1", created=False)
    assert view(database).requests_total == 2


def test_a_submission_that_breaks_off_leaves_nothing(database: Database) -> None:
    def breaking() -> object:
        yield from some_requests(1_500)
        raise ConnectionError("the client is gone")

    with pytest.raises(ConnectionError), database.write() as session:
        writes.insert_job(session, a_job(), breaking())  # type: ignore[arg-type]

    with database.read() as session:
        assert queries.job(session, "job-1") is None


def test_a_worker_registers_sends_heartbeats_and_stops(database: Database) -> None:
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id="w", devices=("cuda:0",)))
        writes.update_calibration(session, "w", {"verify_ms": [1.0, 2.0]})
        writes.record_heartbeat(session, "w")
    with database.read() as session:
        (worker,) = queries.workers(session)
    assert (worker.devices, worker.calibration, worker.stopped_at) == (["cuda:0"], {"verify_ms": [1.0, 2.0]}, None)
    assert worker.last_seen_at >= worker.started_at

    with database.write() as session:
        writes.mark_stopped(session, "w")
    with database.read() as session:
        (worker,) = queries.workers(session)
        assert worker.stopped_at is not None
        assert queries.models(session) == []


@pytest.mark.postgresql
def test_rows_that_lose_their_connection_while_they_are_copied_say_so_as_every_statement_does(
    postgresql: Database,
) -> None:
    def copy_without_connection() -> None:
        with postgresql.write() as session:
            own = session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            with postgresql.write() as other:
                other.connection().exec_driver_sql(f"SELECT pg_terminate_backend({own})")
            insert_many(session, PackedSteps, [{"job_id": "job-1"}])

    with pytest.raises(DATABASE_UNAVAILABLE):
        copy_without_connection()
