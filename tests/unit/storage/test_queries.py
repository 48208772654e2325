from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import text

from storage import job_details, queries, writes
from storage.job_details import ErrorCount
from storage.job_filter import JobFilter
from storage.queries import DepthAcceptance, JobStats
from storage.records import NewRequest, RequestFailure, RequestProgress, StepRow
from storage.session import Database
from storage.steps.columns import StepColumns
from tests.factories import a_request, a_step, a_worker_card
from tests.unit.storage.acts import (
    claim,
    claim_one,
    end_of,
    flush,
    record,
    tokens_of,
    view,
    whole,
)


def stats(database: Database, job_id: str | None = "job-1") -> JobStats:
    with database.read() as session:
        return queries.total_stats(session) if job_id is None else queries.job_stats(session, job_id)


def decode(database: Database, *steps: StepRow, job_id: str = "job-1") -> None:
    """Record a job of one request and decode it in these steps."""
    record(database, job_id)
    part = tokens_of(1, *(step.emitted_tokens for step in steps))
    part = type(part)(0, 1, part.token_ids, part.accepted, part.text, part.pieces, StepColumns.of(steps))
    flush(database, "w1", RequestProgress(claim_one(database).lease, (part,), (end_of(part),), ends=True))


def test_an_unknown_job_is_none(database: Database) -> None:
    with database.read() as session:
        assert queries.job(session, "nowhere") is None


def test_jobs_are_paged_newest_first_without_gaps_or_repeats(database: Database) -> None:
    for number in range(7):
        record(database, f"job-{number}")
    with database.write() as session:  # the ids decide between jobs of the same moment
        session.execute(text("UPDATE jobs SET created_at = 5.0 WHERE id IN ('job-2', 'job-3', 'job-4')"))

    seen, after, more = list[str](), None, True
    with database.read() as session:
        while more:
            page = queries.jobs(session, 2, after)
            seen += [job.id for job in page.jobs]
            after, more = seen[-1], page.has_more

    assert seen == ["job-6", "job-5", "job-1", "job-0", "job-4", "job-3", "job-2"]


def test_an_unknown_job_as_cursor_returns_an_empty_page(database: Database) -> None:
    record(database)
    with database.read() as session:
        assert queries.jobs(session, 5, after="nowhere") == queries.JobViewPage((), has_more=False)


def test_jobs_are_found_by_a_literal_prefix_of_their_ids(database: Database) -> None:
    for job_id in ("a_1", "a_2", "ab1"):
        record(database, job_id)
    with database.read() as session:
        found = {
            asked: {job.id for job in queries.jobs(session, 5, wanted=JobFilter(id_prefix=asked)).jobs}
            for asked in ("a_", "ab", "%")
        }
    assert found == {"a_": {"a_1", "a_2"}, "ab": {"ab1"}, "%": set()}


def test_outputs_come_in_the_order_of_the_job_with_failed_requests_among_them(database: Database) -> None:
    bad = NewRequest("bad", failure=RequestFailure("invalid_value", "no", "top_p"))
    record(database, requests=[a_request("a"), bad, a_request("c"), a_request("d")])
    first, third, _ = claim(database, limit=3)
    one, two = tokens_of(1, 1, 2), tokens_of(1, 1, 1, choice=1)
    flush(database, "w1", whole(third.lease, 1))
    flush(database, "w1", RequestProgress(first.lease, (two, one), (end_of(two, choice=1), end_of(one)), ends=True))

    with database.read() as session:
        found = list(queries.outputs(session, "job-1"))
        behind = list(queries.outputs(session, "job-1", after_index=1))

    assert [(o.custom_id, o.status, len(o.choices)) for o in found] == [
        ("a", "completed", 2),
        ("bad", "failed", 0),
        ("c", "completed", 1),
    ]
    assert [choice.text for choice in found[0].choices] == ["yxy", "yy"]
    assert (found[1].error_code, found[1].error_param, found[1].error_status_code) == ("invalid_value", "top_p", 400)
    assert [o.custom_id for o in behind] == ["c"]


def test_statistics_of_a_job_that_has_not_started_are_none(database: Database) -> None:
    record(database, requests=2)

    numbers = stats(database)

    assert (numbers.requests_total, numbers.completion_tokens, numbers.wall_s, numbers.steps) == (2, 0, 0.0, 0)
    assert (numbers.mean_acceptance_length, numbers.tokens_per_s) == (None, None)
    assert (numbers.speedup, numbers.speedup_source) == (None, None)
    assert numbers.acceptance_by_depth == ()


def test_statistics_leave_the_token_from_prefill_out(database: Database) -> None:
    prefill = a_step(step=0, tree_nodes=0, tree_depth=0, accepted_tokens=0, emitted_tokens=1, plain_step_ms=None)
    decode(
        database,
        prefill,
        a_step(step=1, tree_depth=2, accepted_tokens=2, emitted_tokens=3, expected_accepted=1.5),
        a_step(step=2, tree_depth=1, accepted_tokens=0, emitted_tokens=1, expected_accepted=0.5),
    )

    numbers = stats(database)

    assert (numbers.steps, numbers.completion_tokens, numbers.prompt_tokens) == (2, 5, 5)
    assert numbers.mean_acceptance_length == pytest.approx(2.0)
    assert numbers.mean_accepted == pytest.approx(1.0)
    assert numbers.mean_expected == pytest.approx(1.0)
    assert numbers.acceptance_by_depth == (DepthAcceptance(1, 2, 1, 0.5), DepthAcceptance(2, 1, 1, 1.0))


def test_speedup_is_plain_time_over_spent_time_of_comparable_steps(database: Database) -> None:
    decode(
        database,
        a_step(step=0, tree_nodes=0, tree_depth=0, accepted_tokens=0, emitted_tokens=1, plain_step_ms=None),
        # Two sequences in 12 ms, three tokens for this one; plain steps would have taken 3 x 8 ms.
        a_step(step=1, accepted_tokens=2, emitted_tokens=3, step_ms=12.0, plain_step_ms=8.0, batch_sequences=2),
        # Alone in 10 ms, one token; a plain step takes 6 ms.
        a_step(step=2, accepted_tokens=0, emitted_tokens=1, step_ms=10.0, plain_step_ms=6.0, batch_sequences=1),
    )

    numbers = stats(database)
    with database.read() as session:
        row = session.execute(text("SELECT * FROM job_speedup")).one()

    assert numbers.speedup == pytest.approx((3 * 8 / 2 + 6) / (12 / 2 + 10))
    assert (row.job_id, row.steps, row.emitted_tokens, row.source) == ("job-1", 2, 4, numbers.speedup_source)
    assert row.speedup == pytest.approx(numbers.speedup)
    assert row.mean_emitted_per_step == pytest.approx(2.0)
    assert row.tokens_per_s == pytest.approx(4 / 0.016)
    assert row.plain_tokens_per_s == pytest.approx(4 / 0.018)


def test_the_view_of_acceptance_equals_the_statistics(database: Database) -> None:
    shapes = [(0, 0), (1, 0), (1, 1), (3, 0), (3, 2), (4, 4), (2, 1), (4, 1)]
    decode(
        database,
        *(
            a_step(step=number, tree_nodes=9, tree_depth=depth, accepted_tokens=kept, emitted_tokens=kept + 1)
            for number, (depth, kept) in enumerate(shapes)
        ),
    )

    with database.read() as session:
        rows = session.execute(text("SELECT depth, tried, accepted, rate FROM acceptance_by_depth")).all()

    seen = [DepthAcceptance(depth, tried, accepted, float(rate)) for depth, tried, accepted, rate in sorted(rows)]
    assert [(at.depth, at.tried, at.accepted) for at in seen] == [(1, 7, 5), (2, 5, 2), (3, 4, 1), (4, 2, 1)]
    assert stats(database).acceptance_by_depth == tuple(seen)


def test_throughput_is_counted_by_the_minute_in_which_a_step_ended(database: Database) -> None:
    ends = [120.0, 179.9, 180.0, 210.0, 239.5]
    decode(
        database,
        *(a_step(step=n, accepted_tokens=0, emitted_tokens=1, ended_at=ended_at) for n, ended_at in enumerate(ends)),
    )

    with database.read() as session:
        rows = session.execute(text("SELECT minute, job_id, tokens, steps FROM throughput_by_minute ORDER BY minute"))
        assert [tuple(row) for row in rows] == [(120, "job-1", 2, 2), (180, "job-1", 3, 3)]


def test_totals_count_time_in_which_jobs_overlap_once(database: Database) -> None:
    for job_id in ("a", "b", "c", "waiting"):
        record(database, job_id)
    spans = {"a": (10.0, 20.0), "b": (15.0, 30.0), "c": (50.0, 55.0)}
    with database.write() as session:
        for job_id, (began, ended) in spans.items():
            session.execute(
                text("UPDATE jobs SET started_at = :began, finished_at = :ended WHERE id = :id"),
                {"began": began, "ended": ended, "id": job_id},
            )

    assert stats(database, "b").wall_s == pytest.approx(15.0)
    assert stats(database, None).wall_s == pytest.approx(25.0)


def test_totals_are_sums_over_jobs(database: Database) -> None:
    decode(database, a_step(step=0, accepted_tokens=0, emitted_tokens=1), job_id="a")
    decode(database, a_step(step=0, accepted_tokens=1, emitted_tokens=2), job_id="b")

    total = stats(database, None)

    assert (total.job_id, total.requests_total, total.requests_completed) == (None, 2, 2)
    assert total.completion_tokens == view(database, "a").completion_tokens + view(database, "b").completion_tokens == 3


def test_models_are_those_of_workers_that_are_alive(database: Database) -> None:
    with database.write() as session:
        for worker, target, context in (("a", "small", 512), ("b", "small", 256), ("c", "large", 64), ("d", "gone", 1)):
            writes.register_worker(session, a_worker_card(id=worker, target=target, context_tokens=context))
        writes.mark_stopped(session, "d")
        session.execute(text("UPDATE workers SET last_seen_at = last_seen_at - 61 WHERE id = 'c'"))

    with database.read() as session:
        assert queries.models(session) == [queries.ModelView("small", 256)]
        assert {worker.id for worker in queries.workers(session)} == {"a", "b", "c", "d"}


def test_every_error_of_a_job_is_listed_or_counted(database: Database) -> None:
    """Different errors of one code are listed apart; beyond the limit, the rest is counted by code."""
    told = [
        RequestFailure("bad", "line 1: Too hot: 9."),
        RequestFailure("bad", "requests[1], n: Too long.", "n"),
        RequestFailure("bad", "line 12: Too hot: 9."),
        RequestFailure("worse", "Gone: away."),
        RequestFailure("bad", "Too long.", "max_tokens"),
    ]
    record(database, "job-1", [NewRequest(str(n), failure=failure) for n, failure in enumerate(told)])

    def errors(limit: int) -> list[ErrorCount]:
        with database.read() as session:
            return job_details.errors(session, "job-1", limit)

    hot = ErrorCount("bad", "Too hot: 9.", 2)
    few, long = (ErrorCount("bad", f"{name}: Too long.", 1) for name in ("max_tokens", "n"))
    gone = ErrorCount("worse", "Gone: away.", 1)
    assert errors(20) == [hot, few, long, gone]
    assert errors(1) == [hot, ErrorCount("bad", None, 2), ErrorCount("worse", None, 1)]


def test_a_request_is_shown_with_the_kind_of_its_grammar(database: Database) -> None:
    plain, bound = a_request("a"), a_request("b")
    assert bound.body is not None
    record(database, "job-1", [plain, replace(bound, body={**bound.body, "grammar": {"kind": "regex", "value": "a"}})])
    with database.read() as session:
        assert [request.grammar for request in job_details.requests(session, "job-1")] == [None, "regex"]
