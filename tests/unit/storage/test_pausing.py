"""Pause and resume: nothing of a paused job runs, nothing is lost, and its texts are those without the pause."""

from __future__ import annotations

from sqlalchemy import select, update

from storage import batches, event_log, health, leases, queue_stats, writes
from storage.event_log import Cursor
from storage.models import ChoiceOutput, JobRow
from storage.pausing import BY_USER, pause_job, resume_job
from storage.records import RequestProgress
from storage.session import Database
from tests.factories import a_worker_card, some_requests
from tests.unit.storage.acts import (
    cancel,
    check_laws,
    claim,
    claim_one,
    expire,
    flush,
    going_on,
    reclaimed,
    record,
    requests_of,
    tokens_of,
    view,
    whole,
)


def pause(database: Database, job_id: str = "job-1", reason: str = BY_USER) -> bool:
    with database.write() as session:
        return pause_job(session, job_id, reason)


def resume(database: Database, job_id: str = "job-1") -> bool:
    with database.write() as session:
        return resume_job(session, job_id)


def statuses(database: Database) -> list[str]:
    return [row.status for row in requests_of(database).values()]


def test_no_request_of_a_paused_job_is_claimed_until_it_is_resumed(database: Database) -> None:
    record(database, requests=2)

    assert pause(database)
    assert view(database).status == "paused"
    assert claim(database, limit=2) == []
    assert resume(database)

    assert view(database).status == "in_progress"
    assert len(claim(database, limit=2)) == 2


def test_running_requests_return_to_the_queue_with_their_tokens_and_continue_from_them(database: Database) -> None:
    record(database, requests=2)
    going, done = claim(database, "w1", limit=2)
    flush(database, "w1", going_on(going, 1, 3), held=[done.lease])
    pause(database)

    more = RequestProgress(going.lease, (tokens_of(2, 2, first=2),))
    result = flush(database, "w1", more, whole(done.lease, 2))

    assert (result.returned, result.lost) == (frozenset({going.lease.key}), frozenset())
    assert statuses(database) == ["queued", "completed"]
    assert requests_of(database)[0].attempts == 0  # given back: the attempt does not count
    check_laws(database)
    resume(database)
    (again,) = claim(database, "w2", limit=2)
    assert [checkpoint.text for checkpoint in again.checkpoints] == ["yxxy", "xy"]
    flush(database, "w2", going_on(again, 1, ends=True))
    assert view(database).status == "completed"
    with database.read() as session:
        text = session.scalar(select(ChoiceOutput.text).where(ChoiceOutput.request_index == 0))
    assert text == "yxxyxyy"
    check_laws(database)


def test_a_flush_that_is_repeated_after_the_pause_writes_nothing_twice(database: Database) -> None:
    record(database)
    claimed = claim_one(database)
    pause(database)
    progress = going_on(claimed, 1, 3)
    flush(database, "w1", progress)

    again = flush(database, "w1", progress)  # the worker does not know that the first one was committed

    assert (again.lost, again.returned) == (frozenset({claimed.lease.key}), frozenset())
    assert view(database).completion_tokens == 4
    check_laws(database)


def test_a_job_whose_last_request_ends_while_it_is_paused_completes(database: Database) -> None:
    record(database)
    claimed = claim_one(database)
    pause(database)

    assert flush(database, "w1", whole(claimed.lease, 2)).ended_jobs == (("job-1", "completed"),)
    assert view(database).status == "completed"
    assert not pause(database)
    assert not resume(database)


def test_a_worker_that_dies_while_its_job_is_paused_loses_nothing(database: Database) -> None:
    record(database, requests=2)
    claimed = claim(database, "w1", limit=2)
    flush(database, "w1", going_on(claimed[0], 1, 3), held=[claimed[1].lease])
    pause(database)
    reclaimed(database, "w1")
    assert statuses(database) == ["queued", "queued"]
    assert claim(database, "w2", limit=2) == []  # neither as a suspect

    resume(database)
    going = claim_one(database, "w2")  # it had shown that it does no harm; the other one is a suspect
    assert going.lease.key == claimed[0].lease.key
    flush(database, "w2", going_on(going, 2, ends=True))
    (suspect,) = claim(database, "w2", limit=2)
    flush(database, "w2", whole(suspect.lease, 1))
    assert view(database).status == "completed"
    check_laws(database)


def test_pausing_and_resuming_twice_is_the_same_as_once(database: Database) -> None:
    record(database)
    assert pause(database, reason="budget")
    paused_at = view(database).paused_at
    assert pause(database)
    assert (view(database).paused_at, view(database).pause_reason) == (paused_at, "budget")

    assert resume(database)
    assert resume(database)
    assert (view(database).status, view(database).paused_at) == ("in_progress", None)


def test_a_paused_job_can_be_cancelled(database: Database) -> None:
    record(database, requests=2)
    running = claim_one(database)
    pause(database)

    assert cancel(database) == "cancelling"
    assert flush(database, "w1", held=[running.lease]).ended_jobs == (("job-1", "cancelled"),)
    check_laws(database)


def test_a_paused_job_expires_with_its_window(database: Database) -> None:
    record(database, requests=2)
    pause(database)
    with database.write() as session:
        session.execute(update(JobRow).values(expires_at=0.0))

    assert expire(database) == [("job-1", "expired")]
    check_laws(database)


def test_a_batch_that_is_paused_while_it_is_validating_is_paused_after_that(database: Database) -> None:
    record(database, requests=0, input_file_id="file-1", completion_window="24h")
    assert pause(database)
    assert view(database).status == "validating"
    with database.write() as session:
        claimed = batches.claim_batch(session, 30.0)
    assert claimed is not None
    with database.write() as session:
        batches.add_requests(session, claimed, 0, some_requests(2))
        batches.start_batch(session, claimed, "tiny", 2, 0, 30.0)

    assert view(database).status == "paused"
    assert claim(database, limit=2) == []
    resume(database)
    assert len(claim(database, limit=2)) == 2


def test_an_interactive_request_can_t_be_paused(database: Database) -> None:
    record(database, priority=1)
    assert not pause(database)
    assert len(claim(database)) == 1


def test_readers_of_events_receive_the_pause_and_the_end_of_it(database: Database) -> None:
    record(database)
    with database.read() as session:
        first = event_log.read(session, "job-1", Cursor(), 10)
    pause(database)
    with database.read() as session:
        paused = event_log.read(session, "job-1", first.cursor, 10)
    resume(database)
    with database.read() as session:
        resumed = event_log.read(session, "job-1", paused.cursor, 10)

    assert [page.cursor.status for page in (first, paused, resumed)] == ["in_progress", "paused", "in_progress"]


def test_a_paused_job_calls_no_worker_and_is_not_stuck(database: Database) -> None:
    record(database, requests=3)
    pause(database)
    with database.write() as session:
        writes.register_worker(session, a_worker_card())
        session.execute(update(JobRow).values(created_at=0.0))
        assert leases.jobs_to_notify(session, -1.0) == []
        assert health.health(session, 60.0).stuck == ()
        (stats,) = queue_stats.collect(session).open_jobs
    assert (stats.queued, stats.paused, stats.oldest_s) == (0, 3, 0.0)
