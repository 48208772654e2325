"""Speed-up checks: requests of a finished job, decoded again with and without drafts by an idle worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select, text, update

from storage import speedup_checks
from storage.models import CheckedRequest, ChoiceOutput, DecodeStep, JobRow
from storage.session import Database
from storage.statistics import job_stats
from tests.databases import on_sqlite
from tests.unit.worker.serving.test_runner import AT_END, DRAFTED, Worker, submit, texts
from worker.engine.stats import StepResult
from worker.serving import speedup_check


@pytest.fixture(autouse=True)
def _poll_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedup_check, "_POLL_S", 0.0)


def compared(database: Database, job_id: str = "batch_1") -> list[CheckedRequest]:
    with database.read() as session:
        rows = select(CheckedRequest).where(CheckedRequest.job_id == job_id).order_by(CheckedRequest.request_index)
        return list(session.scalars(rows))


def run_until_it_compares(worker: Worker) -> None:
    for _ in range(500):
        worker.runner.run_once(notified=worker.work_waits())
        if worker.engine.busy and not worker.runner.stats["requests"]:
            return
    raise AssertionError("it never compared anything")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sampled_job_is_decoded_in_both_variants_with_the_same_texts(database: Database, temperature: float) -> None:
    submit(database, "one", "two", "three", "four", "five", compare_plain=4, temperature=temperature, max_tokens=18)
    Worker(database, "a", interval_s=AT_END).run(2_000)
    rows = compared(database)
    assert [row.same_text for row in rows] == [True] * 4
    assert all(row.plain_ms and row.drafted_ms and row.tokens > 10 for row in rows)
    with database.read() as session:
        job = session.scalars(select(JobRow)).one()
        assert job.compared_at is not None
        assert job.finished_at is not None
        assert job.compared_at >= job.finished_at
        numbers = job_stats(session, job.id).comparison
    assert numbers is not None
    assert numbers.done
    assert (numbers.requests_asked, numbers.requests, numbers.faults) == (4, 4, 0)
    assert numbers.speedup is not None
    assert numbers.speedup_error is not None


def test_an_answer_without_tokens_is_not_compared(database: Database) -> None:
    submit(database, "one", compare_plain=1, max_tokens=0, prompt_logprobs=0)
    Worker(database, "a", interval_s=AT_END).run()
    assert compared(database) == []
    with database.read() as session:
        assert session.scalars(select(JobRow)).one().compared_at is not None


def test_steps_of_both_variants_are_interleaved_and_plain_steps_have_no_drafts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[bool, int]] = []
    take = speedup_check._Variant.take

    def noted(variant: speedup_check._Variant, result: StepResult) -> None:
        taken.append((plain(variant), result.stats.tree_nodes))
        take(variant, result)

    monkeypatch.setattr(speedup_check._Variant, "take", noted)
    submit(database, "one", compare_plain=1)
    Worker(database, "a", interval_s=AT_END).run(2_000)
    assert {nodes for is_plain, nodes in taken if is_plain} == {0}
    assert any(nodes for is_plain, nodes in taken if not is_plain)
    turns = [is_plain for is_plain, _ in taken]
    assert turns[: turns.index(True) + 1] == [False, True]


def plain(variant: speedup_check._Variant) -> bool:
    """Return whether it is the plain variant, by the last part of its key."""
    assert isinstance(variant.key, tuple)
    return bool(variant.key[-1])


def test_plain_steps_have_as_many_sequences_as_those_with_drafts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text is drafted, and ends long before the others; then both variants must have the same batch size."""
    taken: list[tuple[bool, int]] = []
    take = speedup_check._Variant.take

    def noted(variant: speedup_check._Variant, result: StepResult) -> None:
        if result.stats.plain_step_ms is not None:
            taken.append((plain(variant), result.stats.batch_sequences))
        take(variant, result)

    monkeypatch.setattr(speedup_check._Variant, "take", noted)
    submit(database, "one", "two", DRAFTED, compare_plain=3, max_tokens=14, stop=["dog"])
    with database.write() as session:
        session.execute(
            text("UPDATE requests SET body = json_set(body, '$.sampling.stop', json('[]')) WHERE request_index < 2")
        )
    Worker(database, "a", max_sequences=8, interval_s=AT_END).run(4_000)
    batch = 3
    for is_plain, sequences in taken:
        assert sequences <= batch or not is_plain
        batch = batch if is_plain else sequences
    assert {sequences for is_plain, sequences in taken if is_plain} >= {2, 3}
    assert [row.same_text for row in compared(database)] == [True] * 3


def test_texts_of_the_job_are_not_drafts_of_its_speedup_check(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts copied from the text would be faster than the drafts of the job were."""
    groups: list[object] = []
    of_plain: dict[bool, set[object]] = {False: set(), True: set()}
    take = speedup_check._Variant.take

    def noted(variant: speedup_check._Variant, result: StepResult) -> None:
        groups.append(variant.sequence.group)
        assert isinstance(variant.key, tuple)
        of_plain[variant.key[-1]].add(variant.sequence.group)
        take(variant, result)

    monkeypatch.setattr(speedup_check._Variant, "take", noted)
    submit(database, "one", "two", compare_plain=2)
    worker = Worker(database, "a", interval_s=AT_END)
    run_until_it_compares(worker)
    for _ in range(8):
        worker.runner.run_once(notified=worker.work_waits())
    first = set(groups)
    worker.runner.hand_back()
    groups.clear()
    worker.run(2_000)
    assert first
    assert groups
    assert "batch_1" not in first | set(groups)
    assert not first & set(groups)
    assert not of_plain[False] & of_plain[True], "the plain text of a request is not a draft of its twin"


def test_the_sample_of_a_job_is_always_the_same(database: Database, tmp_path: Path) -> None:
    prompts = [f"prompt {n}" for n in range(9)]
    submit(database, *prompts, compare_plain=3, max_tokens=2)
    Worker(database, "a", max_sequences=9, interval_s=AT_END).run(2_000)
    (tmp_path / "other").mkdir()
    with on_sqlite(tmp_path / "other") as other:
        submit(other, *prompts, compare_plain=3, max_tokens=2)
        Worker(other, "b", max_sequences=9, interval_s=AT_END).run(2_000)
        again = [row.request_index for row in compared(other)]
    assert [row.request_index for row in compared(database)] == again
    assert len(again) == 3


def test_new_requests_preempt_a_speedup_check(database: Database) -> None:
    submit(database, "one", "two", "three", compare_plain=3, max_tokens=6)
    worker = Worker(database, "a", interval_s=AT_END)
    run_until_it_compares(worker)
    submit(database, "four", "five", "six", job_id="batch_2", max_tokens=6)
    worker.runner.run_once(notified=True)
    assert worker.runner.stats["requests"] == 3
    worker.run(2_000)
    with database.read() as session:
        served_at = session.scalar(select(JobRow.finished_at).where(JobRow.id == "batch_2"))
        compared_at = session.scalar(select(JobRow.compared_at).where(JobRow.id == "batch_1"))
    assert served_at is not None
    assert compared_at is not None
    assert served_at < compared_at
    assert [row.same_text for row in compared(database)] == [True] * 3


def test_an_engine_with_one_slot_decodes_one_variant_after_the_other(database: Database) -> None:
    submit(database, "one", "two", compare_plain=2, max_tokens=6)
    Worker(database, "a", max_sequences=1, interval_s=AT_END).run(2_000)
    assert [row.same_text for row in compared(database)] == [True, True]


def test_a_text_that_differs_is_logged_as_an_error(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    submit(database, "one", "two", compare_plain=2, max_tokens=6)
    worker = Worker(database, "a", interval_s=AT_END)
    run_until_it_compares(worker)
    worker.runner.hand_back()
    with database.write() as session:
        tokens = session.scalar(select(ChoiceOutput.token_ids).where(ChoiceOutput.request_index == 1))
        assert tokens is not None
        session.execute(update(ChoiceOutput).where(ChoiceOutput.request_index == 1).values(token_ids=[*tokens[:-1], 7]))
    worker.run(2_000)
    assert [row.same_text for row in compared(database)] == [True, False]
    with database.read() as session:
        numbers = job_stats(session, "batch_1").comparison
    assert numbers is not None
    assert numbers.faults == 1
    assert "Request 1 of job batch_1 got a different text" in caplog.text


def test_a_speedup_check_does_not_change_its_job(database: Database) -> None:
    submit(database, "one", "two", compare_plain=2, max_tokens=6)
    worker = Worker(database, "a", interval_s=AT_END)
    run_until_it_compares(worker)
    before = texts(database), steps(database), len(worker.events)
    worker.run(2_000)
    assert (texts(database), steps(database), len(worker.events)) == before


def steps(database: Database) -> int:
    with database.read() as session:
        return len(session.scalars(select(DecodeStep)).all())


def test_a_stopping_worker_releases_its_speedup_check_at_once(database: Database) -> None:
    submit(database, "one", "two", compare_plain=2, max_tokens=6)
    first = Worker(database, "a", interval_s=AT_END)
    run_until_it_compares(first)
    second = Worker(database, "b", interval_s=AT_END)
    second.runner.run_once(notified=True)
    assert not second.runner.busy
    first.runner.hand_back()
    second.run(2_000)
    assert {row.worker_id for row in compared(database)} == {"b"}


def test_a_speedup_check_that_killed_two_workers_is_not_claimed_again(database: Database) -> None:
    submit(database, "one", "two", compare_plain=2, max_tokens=6)
    for name in ("a", "b"):
        run_until_it_compares(Worker(database, name, interval_s=AT_END))  # and never comes back
        with database.write() as session:
            speedup_checks.fail_checks(session, [name])
    third = Worker(database, "c", interval_s=AT_END)
    third.runner.run_once(notified=True)
    assert not third.runner.busy


def test_a_request_that_can_no_longer_be_decoded_is_left_out(database: Database) -> None:
    submit(database, "one", "two", compare_plain=2, max_tokens=6)
    worker = Worker(database, "a", interval_s=AT_END)
    run_until_it_compares(worker)
    worker.runner.hand_back()
    with database.write() as session:
        session.execute(text("UPDATE requests SET body = '{}' WHERE request_index = 0"))
    worker.run(2_000)
    assert [row.request_index for row in compared(database)] == [1]
