"""Copies of answers: each is computed once for its owner, nothing waits for ever, and no copy counts as work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select, update

from storage import cached_answers, event_log, leases, pausing, prune, queries
from storage.budgets import spent_budget
from storage.cached_answers import CacheScope, Copied, Repeats, copy_answers
from storage.erasure import erase_job, hide_job
from storage.models import ChoiceOutput, DecodeStep, JobRow, PilotRow, Request
from storage.pilots import read_pilot
from storage.records import Claim, NewRequest, RequestFailure, RequestProgress
from storage.session import Database
from tests.factories import a_request
from tests.unit.storage.acts import (
    cancel,
    check_laws,
    claim,
    flush,
    going_on,
    record,
    requests_of,
    tokens_of,
    view,
    whole,
)

SCOPE = CacheScope("scope-1", "fp_1")
OTHER = CacheScope("scope-2", "fp_1")


def equal(count: int, identity: str | None = "same") -> list[NewRequest]:
    return [a_request(f"{identity}-{number}", identity=identity) for number in range(count)]


class Serving:
    """A worker that answers from the cache."""

    def __init__(self, database: Database, name: str = "w1", scope: CacheScope = SCOPE) -> None:
        self.database, self.name, self.repeats = database, name, Repeats(scope)

    def claim(self, limit: int = 8, lease_s: float = 30.0) -> list[Claim]:
        return claim(self.database, self.name, limit, lease_s, repeats=self.repeats)

    def copy(self) -> Copied:
        with self.database.write() as session:
            return copy_answers(session, self.repeats.answered, self.repeats.scope)

    def complete(self, claimed: Claim, *emitted: int) -> None:
        numerics = self.repeats.scope.numerics
        flush(self.database, self.name, whole(claimed.lease, *(emitted or (1, 3))), numerics=numerics)

    def fail(self, claimed: Claim) -> None:
        failure = RequestFailure("engine_error", "no", status_code=500)
        flush(self.database, self.name, RequestProgress(claimed.lease, failure=failure))

    def answer_all(self, limit: int = 8) -> list[Claim]:
        """Claim, complete and copy until nothing is left; return what was computed."""
        computed: list[Claim] = []
        while (claims := self.claim(limit)) or self.repeats.answered:
            for one in claims:
                self.complete(one)
            computed += claims
            self.copy()
        return computed


def outputs(database: Database, job_id: str = "job-1") -> list[Any]:
    with database.read() as session:
        query = select(*ChoiceOutput.__table__.columns).where(ChoiceOutput.job_id == job_id)
        return list(session.execute(query.order_by(ChoiceOutput.request_index)))


def test_equal_requests_of_a_job_are_computed_once(database: Database) -> None:
    record(database, "job-1", [*equal(10), *equal(2, None), *equal(1, "other")])
    worker = Serving(database)
    computed = worker.answer_all(limit=4)
    assert sorted(one.custom_id for one in computed) == ["None-0", "None-1", "other-0", "same-0"]
    assert len({row.text for row in outputs(database)[:10]}) == 1
    assert [row.cached_from for row in outputs(database)[:3]] == [None, "job-1/0", "job-1/0"]
    job = view(database)
    assert (job.status, job.requests_completed, job.requests_cached) == ("completed", 13, 9)
    assert (job.cached_prompt_tokens, job.cached_completion_tokens) == (9 * 5, 9 * 4)
    check_laws(database)


def test_jobs_share_answers_only_under_one_identity_and_one_scope(database: Database) -> None:
    record(database, "job-1", equal(1))
    Serving(database).answer_all()
    record(database, "job-2", [*equal(1), *equal(1, "of another key")])
    assert [one.custom_id for one in Serving(database, "w2", OTHER).claim(1)] == ["same-0"], "another context"
    assert [one.custom_id for one in Serving(database, "w3").claim()] == ["of another key-0"]
    record(database, "job-3", equal(1))
    assert Serving(database, "w4").answer_all() == []
    assert outputs(database, "job-3")[0].cached_from == "job-1/0"
    check_laws(database)


def test_a_text_of_several_numerics_is_no_source(database: Database) -> None:
    record(database, "job-1", equal(1))
    worker = Serving(database)
    (claimed,) = worker.claim()
    begun = tokens_of(1, 1)
    flush(database, "w1", RequestProgress(claimed.lease, (begun,)), numerics="fp_0")
    flush(database, "w1", going_on(replace(claimed, checkpoints=(begun,)), 2, ends=True), numerics="fp_1")
    record(database, "job-2", equal(1))
    assert len(worker.claim()) == 1


def test_a_duplicate_waits_while_its_answer_is_computed_and_takes_over_when_that_ends(database: Database) -> None:
    record(database, "job-1", equal(3))
    worker = Serving(database)
    (leader,) = worker.claim()
    assert worker.claim() == []
    assert worker.repeats.waiting == {"same"}
    worker.fail(leader)
    (second,) = worker.claim()
    assert second.custom_id == "same-1"
    worker.complete(second)
    assert worker.answer_all() == []
    assert [row.status for row in requests_of(database).values()] == ["failed", "completed", "completed"]
    check_laws(database)


def test_after_two_failures_nothing_waits_for_a_third(database: Database) -> None:
    record(database, "job-1", equal(6))
    worker = Serving(database)
    for _ in range(2):
        worker.fail(worker.claim()[0])
    assert len(worker.claim()) == 4


@pytest.mark.parametrize("ends", ["cancelled", "paused", "erased"])
def test_a_duplicate_takes_over_from_one_that_may_not_end(database: Database, ends: str) -> None:
    record(database, "job-1", equal(1))
    worker = Serving(database)
    (leader,) = worker.claim()
    record(database, "job-2", equal(2))
    if ends == "cancelled":
        cancel(database, leader.lease.job_id)
    else:
        with database.write() as session:
            pausing.pause_job(session, "job-1") if ends == "paused" else hide_job(session, "job-1")
    assert [one.lease.job_id for one in Serving(database, "w2").claim()] == ["job-2"]


def test_a_request_that_was_begun_continues_and_others_wait_for_it(database: Database) -> None:
    record(database, "job-1", equal(1))
    dead = Serving(database, "dead")
    (leader,) = dead.claim(lease_s=-1.0)
    record(database, "job-2", equal(2))
    worker = Serving(database)
    with database.write() as session:
        assert leases.claim(session, "w1", "tiny", 8, 30.0, repeats=worker.repeats) == [], "its lapse is not found yet"
    (again,) = worker.claim()
    assert again.lease.request_index == leader.lease.request_index
    worker.complete(again)
    assert worker.answer_all() == []
    assert outputs(database, "job-2")[1].cached_from == "job-1/0"


def test_an_erased_or_pruned_answer_is_never_copied(database: Database) -> None:
    worker = Serving(database)
    for number, remove in enumerate(("hidden", "erased", "outputs", "prompts")):
        job_id = f"source-{number}"
        record(database, job_id, equal(1))
        assert len(worker.answer_all()) == 1
        if remove in ("hidden", "erased"):
            with database.write() as session:
                hide_job(session, job_id)
            list(erase_job(database, job_id)) if remove == "erased" else None
        else:
            old = prune.Ages(outputs_s=-1.0) if remove == "outputs" else prune.Ages(prompts_s=-1.0)
            list(prune.prune(database, old))
    with database.read() as session:
        assert session.scalars(select(Request.identity).where(Request.job_id.in_(["source-2", "source-3"]))).all() == [
            None,
            None,
        ], "a hash of a deleted prompt would tell whether it was a guess"
    found = Serving(database)
    record(database, "source-9", equal(1))
    assert len(found.answer_all()) == 1


def test_an_answer_that_is_erased_after_the_claim_is_computed(database: Database) -> None:
    record(database, "job-1", equal(1))
    worker = Serving(database)
    worker.answer_all()
    record(database, "job-2", equal(1))
    assert worker.claim() == []
    with database.write() as session:
        hide_job(session, "job-1")
    assert worker.copy() == Copied()
    assert len(worker.claim()) == 1


def test_a_hidden_job_that_still_runs_ends(database: Database) -> None:
    record(database, "job-1", equal(1))
    worker = Serving(database)
    worker.answer_all()
    record(database, "job-2", equal(1))
    with database.write() as session:
        hide_job(session, "job-2")
    assert worker.answer_all() == []
    assert requests_of(database, "job-2")[0].status == "completed"


def test_two_workers_that_claim_at_once_compute_equal_requests_once(database: Database) -> None:
    """On PostgreSQL their transactions overlap: the second sees no lease of the first."""
    record(database, "job-1", equal(2))
    first, second = Repeats(SCOPE), Repeats(SCOPE)
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    with database.write() as session:
        session.execute(update(JobRow).values(started_at=1.0))  # a claim locks jobs that have not started
    with database.write() as one, database.write() as other:
        taken = leases.claim(one, "w1", "tiny", 1, 30.0, repeats=first)
        assert leases.claim(other, "w2", "tiny", 1, 30.0, repeats=second) == []
    assert len(taken) == 1
    assert second.waiting == {"same"}


def test_an_interactive_request_takes_an_answer_and_waits_for_none(database: Database) -> None:
    record(database, "job-1", equal(1))
    worker = Serving(database)
    (leader,) = worker.claim()
    record(database, "chat-1", equal(1), priority=1)
    (interactive,) = worker.claim()
    assert interactive.lease.job_id == "chat-1"
    worker.complete(leader)
    record(database, "chat-2", equal(1), priority=1)
    assert worker.claim() == []
    assert [answer.job_id for answer in worker.copy().answers] == ["chat-2"]


def test_a_pilot_is_computed_and_the_rest_of_its_job_takes_its_answers(database: Database) -> None:
    record(database, "job-1", equal(4))
    with database.write() as session:
        session.add_all([PilotRow(job_id="job-1", request_index=index) for index in (0, 1)])
        session.execute(update(JobRow).values(pilot_only=True))
    worker = Serving(database)
    assert len(worker.answer_all()) == 2
    with database.read() as session:
        pilot = read_pilot(session, "job-1")
    assert pilot is not None
    assert (len(pilot.waiting), pilot.copied) == (0, 2), "a prediction counts no copies"
    with database.write() as session:
        pausing.resume_job(session, "job-1")
    assert worker.answer_all() == []
    assert view(database).requests_cached == 2


def test_copied_tokens_cost_no_budget_and_count_in_no_speed(database: Database) -> None:
    record(database, "job-1", equal(3), budget_tokens=20)
    Serving(database).answer_all()
    job = view(database)
    assert (job.status, job.prompt_tokens + job.completion_tokens) == ("completed", 27)
    with database.read() as session:
        assert spent_budget(session, "job-1", 0.0) is None
        stats = queries.job_stats(session, "job-1")
        steps = session.execute(select(DecodeStep.emitted_tokens, DecodeStep.step_ms, DecodeStep.decision)).all()
    assert (stats.completion_tokens, stats.cached_completion_tokens, stats.requests_cached) == (12, 8, 2)
    assert stats.tokens_per_s is not None
    assert stats.tokens_per_s * stats.wall_s == pytest.approx(4)
    assert stats.steps == 1
    assert sum(minute.tokens for minute in stats.minutes) == 4
    assert [row.emitted_tokens for row in steps if row.decision == "cached"] == [4, 4]
    assert all(row.step_ms == 0 for row in steps if row.decision == "cached")


def test_a_reader_gets_the_whole_text_of_a_copy_once(database: Database) -> None:
    record(database, "job-1", equal(2))
    Serving(database).answer_all()
    with database.read() as session:
        page = event_log.read(session, "job-1", event_log.Cursor(), 10)
    with database.read() as session:
        again = event_log.read(session, "job-1", page.cursor, 10)
    first, second = ([e for e in page.events if e.request_index == index] for index in (0, 1))
    assert [event.kind for event in second] == ["tokens", "finished"]
    assert (second[0].text, second[0].tokens, second[0].seq) == (first[0].text, 4, 1)
    assert again.events == ()


def test_copies_of_many_identities_take_several_claims_and_no_request_is_left(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_answers, "MAX_REPEATS", 6)
    named = [a_request(f"r{number}", identity=f"id-{number}") for number in range(20)]
    record(database, "job-1", named)
    Serving(database).answer_all(limit=20)
    record(database, "job-2", [*named, a_request("last")])
    assert [one.custom_id for one in Serving(database).answer_all(limit=2)] == ["last"]
    assert view(database, "job-2").requests_cached == 20


def test_a_copy_has_what_its_source_has(database: Database) -> None:
    record(database, "job-1", equal(2))
    Serving(database).answer_all()
    source, copy = outputs(database)
    differ = {name for name in source._fields if getattr(source, name) != getattr(copy, name)}
    told = {"request_index", "cached_from", "accepted_tokens", "pieces", "started_at", "finished_at", "checkpoints"}
    assert differ <= told | {"last_seq", "event_number"}
