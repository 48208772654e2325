"""Engine and request loop when one of them is ahead: late stop strings, a full channel, an engine that hangs."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select, text

from storage.models import ChoiceOutput, DecodeStep, Request
from storage.session import Database
from tests.unit.worker.serving.test_runner import AT_END, Worker, lapse_leases, submit, texts
from worker.serving import engine_loop
from worker.sharing.access import SoleAccess

PROMPTS = ("the cat and the dog the cat and the dog ", "two")


def run_ahead(worker: Worker, steps: int) -> None:
    """Decode to the end with an engine that runs several steps before the results of the first are read."""
    for _ in range(500):
        worker.requests.notify()
        worker.requests.admit()
        for _ in range(steps):
            worker.engine.run_once()
        worker.requests.collect()
        if not worker.runner.busy:
            return
    raise AssertionError("still busy")


def outputs(database: Database, job_id: str) -> list[tuple[Any, ...]]:
    """Return what the job's outputs and steps say, without times."""
    with database.read() as session:
        rows = session.scalars(
            select(ChoiceOutput).where(ChoiceOutput.job_id == job_id).order_by(ChoiceOutput.request_index)
        )
        return [
            (o.text, tuple(o.token_ids), o.finish_reason, o.completion_tokens, o.accepted_tokens, steps_of(session, o))
            for o in rows
        ]


def steps_of(session: Any, output: ChoiceOutput) -> tuple[tuple[int, int, int], ...]:
    mine = (DecodeStep.job_id == output.job_id) & (DecodeStep.request_index == output.request_index)
    columns = (DecodeStep.step, DecodeStep.emitted_tokens, DecodeStep.accepted_tokens)
    rows = session.execute(select(*columns).where(mine).order_by(DecodeStep.step))
    return tuple((step, emitted, accepted) for step, emitted, accepted in rows)


@pytest.mark.parametrize("stop", [["dog"], ["never", "cat and the"]])
def test_a_stop_string_that_is_found_late_cuts_the_output_as_if_it_had_been_found_in_time(
    database: Database, stop: list[str]
) -> None:
    submit(database, *PROMPTS, job_id="in_time", max_tokens=60, stop=stop)
    Worker(database, "a", interval_s=AT_END).run()
    submit(database, *PROMPTS, job_id="late", max_tokens=60, stop=stop)
    run_ahead(Worker(database, "b"), steps=7)

    assert outputs(database, "late") == outputs(database, "in_time")
    with database.read() as session:
        emitted = select(func.sum(DecodeStep.emitted_tokens)).where(DecodeStep.job_id == "late")
        completion = select(func.sum(ChoiceOutput.completion_tokens)).where(ChoiceOutput.job_id == "late")
        assert session.scalar(emitted) == session.scalar(completion)


def test_an_engine_whose_reports_are_not_read_holds_back_and_goes_on_when_they_are(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(database, *PROMPTS, job_id="read", max_tokens=100)
    Worker(database, "a", interval_s=AT_END).run()
    monkeypatch.setattr(engine_loop, "MAX_UNREAD_REPORTS", 20)
    submit(database, *PROMPTS, job_id="unread", max_tokens=100)
    worker = Worker(database, "b")
    worker.requests.notify()
    worker.requests.admit()
    for _ in range(25):
        worker.engine.run_once()
    held_at = worker.model.forwards
    for _ in range(5):
        worker.engine.run_once()
    assert worker.engine.held_back
    assert worker.model.forwards == held_at

    worker.run()
    assert [row[:4] for row in outputs(database, "unread")] == [row[:4] for row in outputs(database, "read")]


def expiries(database: Database) -> list[float | None]:
    with database.read() as session:
        return list(session.scalars(select(Request.lease_expires_at).where(Request.status == "running")))


def test_leases_are_not_renewed_and_nothing_is_claimed_while_the_engine_does_not_report(database: Database) -> None:
    submit(database, "one", max_tokens=30)
    worker = Worker(database, "a")
    for _ in range(3):
        worker.runner.run_once(notified=worker.work_waits())
    worker.requests.notify()
    worker.requests.admit()  # a claim after the last report
    with database.write() as session:
        session.execute(text("UPDATE requests SET lease_expires_at = 1 WHERE status = 'running'"))
    submit(database, "two", job_id="later")
    for _ in range(5):  # the engine hangs
        worker.requests.notify()
        worker.requests.admit()
        worker.requests.collect()
    assert expiries(database) == [1.0]

    worker.engine.run_once()
    worker.requests.collect()
    (renewed,) = expiries(database)
    assert renewed is not None
    assert renewed > 1
    worker.run()
    assert len(outputs(database, "batch_1") + outputs(database, "later")) == 2


class Denied(SoleAccess):
    """A device that other models have for now."""

    granted = False

    def __init__(self) -> None:
        self.ends: list[bool] = []

    def take_turn(self, timeout_s: float) -> bool:
        return self.granted

    def end_turn(self, *, more: bool) -> None:
        self.ends.append(more)


def test_an_engine_that_waits_for_its_turn_runs_no_step_and_keeps_its_leases(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "_REPORT_S", 0.0)
    submit(database, "one")
    Worker(database, "alone", interval_s=AT_END).run()
    expected = texts(database)
    with database.write() as session:
        session.execute(text("DELETE FROM outputs"))
    submit(database, "one", job_id="again")
    access = Denied()
    worker = Worker(database, "a", access=access)
    for _ in range(3):
        worker.runner.run_once(notified=worker.work_waits())
    with database.write() as session:
        session.execute(text("UPDATE requests SET lease_expires_at = 1 WHERE status = 'running'"))
    for _ in range(3):
        worker.runner.run_once(notified=worker.work_waits())
    assert worker.model.forwards == 0
    assert [expiry for expiry in expiries(database) if expiry is None or expiry <= 1] == []
    access.granted = True
    worker.run()
    assert texts(database) == expected
    assert access.ends[-1] is False, "an idle engine leaves the device to the others"


def test_results_of_a_lost_lease_are_not_those_of_the_next_claim(database: Database) -> None:
    submit(database, "one")
    Worker(database, "undisturbed", interval_s=AT_END).run()
    expected = texts(database)
    with database.write() as session:
        session.execute(text("DELETE FROM outputs"))
    submit(database, "one", job_id="again")
    worker = Worker(database, "a")
    for _ in range(3):
        worker.runner.run_once(notified=worker.work_waits())
    for _ in range(5):
        worker.engine.run_once()  # results that are not read yet
    lapse_leases(database)
    worker.requests.collect()  # the lease is lost, and the same worker may claim the request again
    worker.run()
    assert texts(database) == expected
