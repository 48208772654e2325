"""Statistics of jobs, and the views with the same values."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sqlalchemy import text

from storage import queries, writes
from storage.records import Lease, RequestProgress, StepRow
from storage.session import Database
from storage.statistics import JobStats, ratio_error
from tests.factories import a_checkpoint, a_finished_choice, a_step
from tests.unit.storage.acts import check_sums, claim_one, flush, record


def whole(lease: Lease, *steps: StepRow) -> RequestProgress:
    """A request that was decoded in a prefill and these steps."""
    first = plain(0, emitted_tokens=1, plain_step_ms=None, draft_ms=500.0, step_ms=999.0, ended_at=steps[0].ended_at)
    return RequestProgress(lease, (a_checkpoint(seq=1, steps=(first, *steps)),), (a_finished_choice(),), ends=True)


def decode(database: Database, *steps: StepRow, job_id: str = "job-1") -> None:
    """Record a job of one request that was decoded in these steps, numbered from 1."""
    record(database, job_id)
    flush(database, "w1", whole(claim_one(database).lease, *steps))


def stats(database: Database, job_id: str | None = "job-1", owner: str | None = None) -> JobStats:
    with database.read() as session:
        return queries.job_stats(session, job_id) if job_id else queries.total_stats(session, owner)


def view(database: Database, name: str) -> list[dict[str, Any]]:
    with database.read() as session:
        return [dict(row) for row in session.execute(text(f"SELECT * FROM {name}")).mappings()]


def plain(step: int, decision: str = "probe", **fields: Any) -> StepRow:
    shape = {"tree_nodes": 0, "tree_depth": 0, "accepted_tokens": 0, "emitted_tokens": 1, "expected_accepted": 0.0}
    return a_step(step=step, drafter=None, decision=decision, **shape | fields)


def test_plain_steps_of_the_job_check_the_calibration(database: Database) -> None:
    decode(
        database,
        a_step(step=1, emitted_tokens=3, accepted_tokens=2, step_ms=10.0, plain_step_ms=8.0),
        plain(2, "probe", step_ms=6.0, plain_step_ms=8.0),
        plain(3, "guard", step_ms=6.0, plain_step_ms=8.0),
        plain(4, "nothing", step_ms=9.0, plain_step_ms=8.0),  # a draft lookup took time: not a plain step
    )

    (row,) = view(database, "job_speedup")
    numbers = stats(database)

    assert (row["plain_steps"], numbers.plain_steps) == (2, 2)
    assert row["plain_check"] == pytest.approx(0.75) == numbers.plain_check
    assert row["speedup"] == pytest.approx((3 * 8 + 8 + 8 + 8) / (10 + 6 + 6 + 9)) == numbers.speedup


def test_views_split_the_speedup_by_drafter_hour_and_model(database: Database) -> None:
    decode(
        database,
        a_step(step=1, emitted_tokens=2, step_ms=10.0, plain_step_ms=8.0, drafter="head", ended_at=3599.0),
        a_step(step=2, emitted_tokens=2, step_ms=20.0, plain_step_ms=8.0, drafter="suffix", ended_at=3600.0),
    )

    by_drafter = {row["drafter"]: row["speedup"] for row in view(database, "speedup_by_drafter")}
    by_hour = {row["hour"]: row["speedup"] for row in view(database, "speedup_by_hour")}
    (by_model,) = view(database, "speedup_by_model")

    assert by_drafter == pytest.approx({"head": 1.6, "suffix": 0.8})
    assert by_hour == pytest.approx({0: 1.6, 3600: 0.8})
    assert (by_model["model"], by_model["speedup"]) == ("tiny", pytest.approx(32 / 30))
    assert {share.drafter: share.speedup for share in stats(database).drafters} == pytest.approx(by_drafter)


def test_calibration_is_healthy_when_as_much_is_accepted_as_was_expected(database: Database) -> None:
    decode(
        database,
        a_step(step=1, accepted_tokens=1, expected_accepted=0.6),
        a_step(step=2, accepted_tokens=1, expected_accepted=0.7),
        a_step(step=3, accepted_tokens=2, expected_accepted=1.9),
        plain(4),
    )

    (row,) = view(database, "expected_and_accepted")
    numbers = stats(database)

    # PostgreSQL returns means of integers as decimals.
    assert [float(row[name]) for name in ("mean_expected", "mean_accepted")] == pytest.approx([3.2 / 3, 4 / 3])
    assert [float(row["miscalibration"]), numbers.miscalibration] == pytest.approx([0.2, 0.2])
    bins = [(row["expected_from"], row["steps"]) for row in view(database, "reliability")]
    assert sorted(bins) == [(0.5, 2), (1.75, 1)]
    assert [e.steps for e in numbers.reliability] == [2, 1]
    assert [e.mean_expected for e in numbers.reliability] == pytest.approx([0.65, 1.9])


def test_step_time_is_split_into_draft_verify_and_host(database: Database) -> None:
    decode(
        database,
        a_step(step=1, draft_ms=2.0, verify_ms=6.0, step_ms=10.0, batch_sequences=2),
        a_step(step=2, draft_ms=1.0, verify_ms=3.0, step_ms=5.0, batch_sequences=1),
    )

    (row,) = view(database, "time_by_job")
    numbers = stats(database)

    assert row["busy_s"] == pytest.approx(0.010)
    shares = [row["draft_share"], row["verify_share"], row["host_share"]]
    assert shares == pytest.approx([0.2, 0.6, 0.2])
    assert [numbers.draft_share, numbers.verify_share] == pytest.approx(shares[:2])


def test_the_view_shows_tree_size_by_batch_size(database: Database) -> None:
    decode(
        database,
        a_step(step=1, batch_sequences=1, tree_nodes=20, step_ms=8.0),
        a_step(step=2, batch_sequences=1, tree_nodes=10, step_ms=8.0),
        plain(3, batch_sequences=4, step_ms=16.0),
    )

    rows = {row["batch_sequences"]: row for row in view(database, "tree_by_batch")}

    assert {size: row["mean_tree_nodes"] for size, row in rows.items()} == pytest.approx({1: 15.0, 4: 0.0})
    assert {size: row["share_with_tree"] for size, row in rows.items()} == pytest.approx({1: 1.0, 4: 0.0})
    assert {size: row["mean_step_ms"] for size, row in rows.items()} == pytest.approx({1: 8.0, 4: 16.0})
    assert [(s.batch_sequences, s.mean_step_ms) for s in stats(database).batch_sizes] == [(1, 8.0), (4, 16.0)]


def test_ranks_are_counted_where_they_are_recorded(database: Database) -> None:
    decode(
        database,
        a_step(step=1, reached=((3, 0), (2, 1), (2, None))),
        a_step(step=2, reached=((1, None),)),
        a_step(step=3, reached=None),
    )

    rows = sorted((row["child_rank"], row["tried"], row["accepted"]) for row in view(database, "acceptance_by_rank"))

    assert rows == [(0, 4, 1), (1, 3, 1), (2, 1, 0)]
    assert [(r.child_rank, r.tried, r.accepted) for r in stats(database).acceptance_by_rank] == rows


def test_histogram_and_decisions_are_shares_of_all_steps(database: Database) -> None:
    decode(database, a_step(step=1), a_step(step=2), plain(3, "probe"), plain(4, "guard"))

    histogram = {row["accepted_tokens"]: row["share"] for row in view(database, "acceptance_histogram")}
    decisions = {row["decision"]: row["share"] for row in view(database, "decisions_by_job")}

    assert histogram == pytest.approx({0: 0.5, 1: 0.5})
    assert decisions == pytest.approx({"tree": 0.5, "probe": 0.25, "guard": 0.25})
    assert {d.decision: d.share for d in stats(database).decisions} == pytest.approx(decisions)


def test_tokens_per_joule_are_those_of_minutes_with_a_meter(database: Database) -> None:
    decode(database, *(a_step(step=n, emitted_tokens=2, ended_at=60.0 * n) for n in (1, 2, 3)))
    with database.write() as session:
        writes.add_energy(session, "w1", 61.0, 3.0)
        writes.add_energy(session, "w1", 119.0, 1.0)
        writes.add_energy(session, "w1", 120.0, 4.0)

    (row,) = view(database, "tokens_per_joule")

    assert (row["worker_id"], row["hour"], row["tokens"], row["joules"]) == ("w1", 0, 5, 8.0)
    assert row["tokens_per_joule"] == pytest.approx(0.625) == stats(database, None).tokens_per_joule


def test_without_a_meter_there_are_no_joules(database: Database) -> None:
    decode(database, a_step(step=1))

    assert view(database, "tokens_per_joule") == []
    assert stats(database, None).tokens_per_joule is None


def test_a_job_that_was_flushed_twice_is_summed_once(database: Database) -> None:
    record(database)
    lease = claim_one(database).lease
    flush(database, "w1", whole(lease, a_step(step=1)))
    flush(database, "w1", whole(lease, a_step(step=1)))

    check_sums(database)
    assert stats(database).steps == 1


def test_the_error_of_a_ratio_is_that_of_its_blocks() -> None:
    assert ratio_error([(1.0, 1.0)]) is None
    assert ratio_error([(2.0, 1.0), (4.0, 2.0), (1.0, 0.5)]) == pytest.approx(0.0)
    # Two blocks of one size: the standard error of a mean.
    assert ratio_error([(1.0, 1.0), (3.0, 1.0)]) == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_the_standard_error_of_a_short_job_is_taken_over_requests(database: Database) -> None:
    record(database, requests=3)
    for index in range(3):
        claimed = claim_one(database)
        step = a_step(step=1, step_ms=10.0, plain_step_ms=8.0 + index)
        flush(database, "w1", whole(claimed.lease, step))

    numbers = stats(database)

    assert numbers.speedup == pytest.approx(1.8)
    assert numbers.speedup_error == pytest.approx(0.2 / math.sqrt(3))


def test_totals_can_be_limited_to_one_owner(database: Database) -> None:
    record(database, "mine", api_key_id="me")
    record(database, "yours", requests=2, api_key_id="you")

    assert stats(database, None, "me").requests_total == 1
    assert stats(database, None).requests_total == 3


def test_a_minute_has_its_busy_seconds(database: Database) -> None:
    decode(database, *(a_step(step=n, ended_at=60.0 * n + 5) for n in (1, 2, 3)))
    record(database, "job-2")
    with database.write() as session:
        session.execute(text("UPDATE jobs SET started_at = 118.0, finished_at = 130.5 WHERE id = 'job-1'"))
        session.execute(text("UPDATE jobs SET started_at = 125.0, finished_at = 140.0 WHERE id = 'job-2'"))

    one, everything = stats(database), stats(database, None)

    assert [(m.minute, m.busy_s) for m in one.minutes] == [(60, 2.0), (120, 10.5), (180, 0.0)]
    assert [(m.minute, m.busy_s) for m in everything.minutes] == [(60, 2.0), (120, 20.0), (180, 0.0)]
    assert (one.wall_s, everything.wall_s) == (12.5, 22.0)
