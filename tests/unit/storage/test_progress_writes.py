from __future__ import annotations

import pytest
from sqlalchemy import select

from storage import event_log, queries
from storage.event_log import Cursor
from storage.models import ChoiceOutput, DecodeStep, Partial
from storage.progress.flush import merge_pieces
from storage.records import Lease, RequestFailure, RequestProgress
from storage.session import Database
from storage.steps.columns import StepColumns
from tests.factories import a_step
from tests.unit.storage.acts import (
    cancel,
    check_laws,
    claim,
    claim_one,
    end_of,
    everything,
    flush,
    record,
    release,
    requests_of,
    tokens_of,
    view,
    whole,
)


def steps_of(database: Database) -> list[tuple[int, int, str]]:
    with database.read() as session:
        rows = session.execute(select(DecodeStep.step, DecodeStep.emitted_tokens, DecodeStep.worker_id))
        return [(step, emitted, worker) for step, emitted, worker in rows]


def count(database: Database, model: type[Partial] | type[ChoiceOutput]) -> int:
    with database.read() as session:
        return len(session.execute(select(model.seq if model is Partial else ChoiceOutput.last_seq)).all())


def test_a_finished_request_has_output_steps_and_no_checkpoints(database: Database) -> None:
    record(database)
    held = claim_one(database)

    result = flush(database, "w1", whole(held.lease, 1, 3, 2))

    assert (result.lost, result.ended_jobs) == (frozenset(), (("job-1", "completed"),))
    with database.read() as session:
        (output,) = queries.outputs(session, "job-1")
    assert output.status == "completed"
    assert [(c.text, c.completion_tokens, c.accepted_tokens) for c in output.choices] == [("yxxyxy", 6, 3)]
    assert steps_of(database) == [(0, 1, "w1"), (1, 3, "w1"), (2, 2, "w1")]
    assert count(database, Partial) == 0
    job = view(database)
    assert (job.status, job.requests_completed, job.prompt_tokens, job.completion_tokens) == ("completed", 1, 5, 6)
    check_laws(database)


def test_checkpoints_count_as_tokens_before_the_output_is_there(database: Database) -> None:
    record(database)
    held = claim_one(database)

    flush(database, "w1", RequestProgress(held.lease, (tokens_of(1, 1, 3),)))
    assert view(database).completion_tokens == 4
    check_laws(database)

    flush(database, "w1", RequestProgress(held.lease, (tokens_of(2, 2, first=2),)))
    assert view(database).completion_tokens == 6
    check_laws(database)


def test_a_stale_owner_changes_nothing(database: Database) -> None:
    record(database)
    stale = claim_one(database, "w1", lease_s=-1).lease
    claim_one(database, "w2")
    before = everything(database)

    for progress in (
        whole(stale, 1, 2),
        RequestProgress(stale, (tokens_of(1, 5),)),
        RequestProgress(stale, failure=RequestFailure("context_length_exceeded", "too long")),
    ):
        assert flush(database, "w1", progress, held=[stale]).lost == {stale.key}
    release(database, "w1", stale)

    assert everything(database) == before


@pytest.mark.parametrize("lease", [Lease("job-1", 0, 2), Lease("job-1", 7, 1), Lease("nowhere", 0, 1)])
def test_a_lease_that_was_never_given_is_lost(database: Database, lease: Lease) -> None:
    record(database)
    claim_one(database, "w1")
    before = everything(database)

    assert flush(database, "w1", whole(lease, 1), held=[lease]).lost == {lease.key}
    assert everything(database) == before


def test_no_worker_writes_under_the_lease_of_another(database: Database) -> None:
    record(database)
    lease = claim_one(database, "w1").lease
    before = everything(database)

    assert flush(database, "w2", whole(lease, 1)).lost == {lease.key}
    assert everything(database) == before


def test_a_lapsed_lease_is_renewed_if_the_request_was_not_claimed(database: Database) -> None:
    record(database)
    lease = claim_one(database, "w1", lease_s=-100).lease

    assert flush(database, "w1", held=[lease]).lost == frozenset()

    assert claim(database, "w2") == []
    assert flush(database, "w1", whole(lease, 1)).ended_jobs == (("job-1", "completed"),)
    check_laws(database)


def test_a_flush_sent_twice_is_written_once(database: Database) -> None:
    record(database, requests=2)
    first, second = (c.lease for c in claim(database, limit=2))
    sent = (whole(first, 1, 3), RequestProgress(second, (tokens_of(1, 1, 2),)))
    flush(database, "w1", *sent)
    before = everything(database)

    again = flush(database, "w1", *sent, held=[first, second])

    assert again.lost == frozenset()  # the worker that missed the first result learns that it was committed
    after = everything(database)
    assert {name: rows for name, rows in after.items() if name != "requests"} == {
        name: rows for name, rows in before.items() if name != "requests"
    }
    assert requests_of(database)[0].finished_at is not None
    check_laws(database)


def test_a_choice_finished_twice_stays_one(database: Database) -> None:
    """The flush that finished the first choice is repeated while the second one is decoded."""
    record(database)
    lease = claim_one(database).lease
    early, late = tokens_of(1, 1, 2), tokens_of(2, 4, first=2)
    flush(database, "w1", RequestProgress(lease, (early,)))
    sent = RequestProgress(lease, (late,), (end_of(early, late),))
    flush(database, "w1", sent)
    flush(database, "w1", sent)

    assert count(database, ChoiceOutput) == 1
    assert [step for step, _, _ in steps_of(database)] == [0, 1, 2]
    assert view(database).completion_tokens == 7
    check_laws(database)


def test_a_finished_request_never_changes(database: Database) -> None:
    record(database, requests=2)
    lease = claim(database, limit=2)[0].lease
    flush(database, "w1", whole(lease, 1, 3))
    before = requests_of(database)[0]

    flush(database, "w1", RequestProgress(lease, failure=RequestFailure("invalid_value", "too late")))
    release(database, "w1", lease)
    cancel(database)

    assert requests_of(database)[0] == before
    check_laws(database)


def test_steps_and_tokens_of_two_owners_add_up(database: Database) -> None:
    record(database)
    old = claim_one(database, "w1").lease
    first = tokens_of(1, 1, 3)
    flush(database, "w1", RequestProgress(old, (first,)), lease_s=-1)
    new = claim_one(database, "w2").lease
    second = tokens_of(2, 1, 2, first=0)  # the new owner prefills, and counts its steps from 0 again

    flush(database, "w2", RequestProgress(new, (second,), (end_of(first, second),), ends=True))

    assert steps_of(database) == [(0, 1, "w1"), (1, 3, "w1"), (2, 1, "w2"), (3, 2, "w2")]
    assert view(database).completion_tokens == 7
    check_laws(database)


def test_progress_that_piled_up_is_written_in_one_flush(database: Database) -> None:
    record(database)
    lease = claim_one(database).lease
    parts = [tokens_of(1, 1), tokens_of(2, 3, first=1), tokens_of(3, 2, first=2)]

    flush(
        database,
        "w1",
        RequestProgress(lease, (parts[0],)),
        RequestProgress(lease, (parts[1],)),
        RequestProgress(lease, (parts[2],), (end_of(*parts),), ends=True),
    )

    assert [emitted for _, emitted, _ in steps_of(database)] == [1, 3, 2]
    assert view(database).status == "completed"
    check_laws(database)


def test_a_rejected_request_fails_and_the_job_continues(database: Database) -> None:
    record(database, requests=2)
    first, second = (c.lease for c in claim(database, limit=2))

    failure = RequestFailure("context_length_exceeded", "9 tokens are too many", "prompt")
    assert flush(database, "w1", RequestProgress(first, failure=failure)).ended_jobs == ()
    row = requests_of(database)[0]
    assert (row.status, row.error_code, row.error_message, row.error_param, row.error_status_code) == (
        "failed",
        "context_length_exceeded",
        "9 tokens are too many",
        "prompt",
        400,
    )
    check_laws(database)

    assert flush(database, "w1", whole(second, 1)).ended_jobs == (("job-1", "completed"),)
    job = view(database)
    assert (job.requests_completed, job.requests_failed) == (1, 1)
    check_laws(database)


def test_a_job_ends_exactly_when_its_last_request_does(database: Database) -> None:
    record(database, requests=3)
    held = [c.lease for c in claim(database, limit=3)]

    ended = [flush(database, "w1", whole(lease, 1)).ended_jobs for lease in held]

    assert ended == [(), (), (("job-1", "completed"),)]
    check_laws(database)


def test_one_flush_serves_several_jobs(database: Database) -> None:
    record(database, "a", 1)
    record(database, "b", 2)
    held = {c.lease.key: c.lease for c in claim(database, limit=3)}

    result = flush(database, "w1", whole(held["a", 0], 1, 2), whole(held["b", 0], 1), held=list(held.values()))

    assert result.ended_jobs == (("a", "completed"),)
    assert (view(database, "a").completion_tokens, view(database, "b").completion_tokens) == (3, 1)
    check_laws(database)


def test_a_running_request_of_a_cancelled_job_is_cancelled_at_the_next_flush(database: Database) -> None:
    record(database, requests=3)
    first, second = (c.lease for c in claim(database, limit=2))
    assert cancel(database) == "cancelling"
    assert [row.status for row in requests_of(database).values()] == ["running", "running", "cancelled"]

    result = flush(database, "w1", RequestProgress(first, (tokens_of(1, 4),)))
    assert (result.lost, result.ended_jobs) == (frozenset([first.key]), ())
    assert count(database, Partial) == 0

    result = flush(database, "w1", whole(second, 1), held=[second])
    assert (result.lost, result.ended_jobs) == (frozenset([second.key]), (("job-1", "cancelled"),))
    assert {row.status for row in requests_of(database).values()} == {"cancelled"}
    check_laws(database)


def test_nothing_is_written_for_a_job_whose_window_is_over(database: Database) -> None:
    record(database)
    lease = claim_one(database).lease
    with database.write() as session:
        session.connection().exec_driver_sql("UPDATE jobs SET expires_at = 1.0")
    before = everything(database)

    assert flush(database, "w1", whole(lease, 1), held=[lease]).lost == {lease.key}
    assert everything(database) == before


def test_an_empty_flush_does_nothing(database: Database) -> None:
    result = flush(database, "w1")

    assert (result.lost, result.ended_jobs) == (frozenset(), ())


def test_text_with_a_nul_character_can_be_stored(database: Database) -> None:
    record(database)
    lease = claim_one(database).lease
    part = tokens_of(1, 1)
    odd = type(part)(
        0, 1, (0,), (False,), "a\0b", (("a\0b", "target"),), StepColumns.of([a_step(step=0, emitted_tokens=1)])
    )

    flush(database, "w1", RequestProgress(lease, (odd,), (end_of(odd),), ends=True))

    with database.read() as session:
        text, _ = event_log.read(session, "job-1", Cursor(), 100).events
    assert (text.text, text.pieces) == ("a\ufffdb", (("a\ufffdb", "target"),))


def test_neighbouring_pieces_of_one_source_become_one() -> None:
    assert merge_pieces([("a", "draft"), ("b", "draft"), ("c", "target"), ("d", "draft")]) == [
        ("ab", "draft"),
        ("c", "target"),
        ("d", "draft"),
    ]
