"""The view `decode_steps` shows each step that was written, on both databases, rounded as documented."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update

from storage.models import DecodeStep, PackedSteps, Partial, StepMinute
from storage.records import RequestProgress, StepRow
from storage.session import Database
from storage.steps.columns import StepColumns
from storage.steps.packing import MAX_STEPS, pack, pack_optional, packed_rows, unpack, unpack_optional
from tests.factories import a_checkpoint, a_finished_choice, a_step
from tests.unit.storage.acts import check_sums, claim_one, flush, record

ROUNDED = {"draft_ms": 0.005, "verify_ms": 0.005, "step_ms": 0.005, "plain_step_ms": 0.005}
ROUNDED |= {"expected_accepted": 0.0005, "ended_at": 0.0005}


def decode(database: Database, *flushes: list[StepRow]) -> None:
    """Decode one request, with a checkpoint for each of the lists."""
    record(database)
    lease = claim_one(database).lease
    for number, steps in enumerate(flushes):
        checkpoint = a_checkpoint(seq=number + 1, steps=steps)
        last = number == len(flushes) - 1
        finished = (a_finished_choice(),) if last else ()
        flush(database, "w1", RequestProgress(lease, (checkpoint,), finished, ends=last))


def shown(database: Database) -> list[dict[str, Any]]:
    with database.read() as session:
        rows = session.execute(select(*DecodeStep.__table__.columns).order_by(DecodeStep.step)).mappings()
        return [dict(row) for row in rows]


def packed(database: Database) -> int:
    with database.read() as session:
        return int(session.scalar(select(func.count()).select_from(PackedSteps)) or 0)


def check_shown(database: Database, steps: list[StepRow]) -> None:
    rows = shown(database)
    assert [row["step"] for row in rows] == list(range(len(steps)))
    for row, step in zip(rows, steps, strict=True):
        for name, value in asdict(step).items():
            if name in ROUNDED and value is not None:
                assert row[name] == pytest.approx(value, abs=ROUNDED[name] * 1.0001, rel=0), name
            elif name == "reached":
                assert row[name] == (None if value is None else [list(node) for node in value])
            elif name not in ("step", "tree"):
                assert row[name] == value, name


def some(dice: random.Random, count: int) -> list[StepRow]:
    """Steps of all kinds, in the time between two minutes."""
    steps, ended_at = [], 1.7e9 + 30
    for number in range(count):
        nodes = dice.choice((0, 0, 3, 12, 200)) if number else 0
        accepted = min(nodes, dice.choice((0, 1, 3)))
        ended_at += dice.random() * 2
        steps.append(
            a_step(
                step=number,
                tree_nodes=nodes,
                tree_depth=min(nodes, 4),
                accepted_tokens=accepted,
                emitted_tokens=accepted + 1,
                expected_accepted=dice.choice((None, 0.0, accepted + dice.random())),
                draft_ms=dice.random(),
                verify_ms=dice.random() * 300,
                step_ms=dice.random() * 400,
                batch_sequences=dice.choice((1, 64, 1000)),
                drafter=dice.choice(("suffix", "head+suffix")) if nodes else None,
                plain_step_ms=dice.choice((None, 9.0, 9.125)) if number else None,
                decision=dice.choice(("tree", "nothing", None)),
                ended_at=ended_at,
                reached=((2, 0),) * accepted + ((11, None),) if nodes else dice.choice((None, ())),
                preemptions=dice.choice((0, 0, 1)),
                recomputed_tokens=dice.choice((0, 0, 4096)),
            )
        )
    return steps


def test_every_step_is_a_row_of_the_view(database: Database) -> None:
    steps = some(random.Random(1), 3 * MAX_STEPS)

    decode(database, steps[:1], steps[1:20], steps[20:])

    check_shown(database, steps)
    check_sums(database)
    assert 3 < packed(database) < 20


def test_a_plain_decode_of_128_steps_is_one_row_without_texts_for_what_stays_the_same(database: Database) -> None:
    step = {"tree_nodes": 0, "tree_depth": 0, "accepted_tokens": 0, "emitted_tokens": 1, "drafter": None}
    steps = [a_step(step=n, decision="off", ended_at=1.7e9 + n / 64, **step) for n in range(128)]

    decode(database, steps)

    check_shown(database, steps)
    with database.read() as session:
        (row,) = session.execute(select(*PackedSteps.__table__.columns)).mappings()
    texts = {name: row[name] for name in StepColumns.__dataclass_fields__ if name != "trees"}
    assert [name for name, value in texts.items() if value is not None] == ["ended_ms"]


@pytest.mark.parametrize(
    "far", [{"step_ms": 3.6e6}, {"ended_at": 1.8e9}, {"ended_at": 1.0}, {"recomputed_tokens": 10**6}]
)
def test_a_value_far_from_the_others_gets_a_row_of_its_own(database: Database, far: dict[str, Any]) -> None:
    steps = [a_step(step=n, **({"ended_at": 1.7e9 + n} | (far if n == 4 else {}))) for n in range(9)]

    decode(database, steps)

    check_shown(database, steps)
    assert packed(database) == 3


def test_steps_keep_the_worker_that_made_them(database: Database) -> None:
    steps = some(random.Random(2), 9)
    record(database)
    lease = claim_one(database).lease
    for number, part in enumerate((steps[:4], steps[4:])):
        flush(database, "w1", RequestProgress(lease, (a_checkpoint(seq=number, steps=part),)))
    with database.write() as session:
        session.execute(update(Partial).where(Partial.seq == 0).values(worker_id="w0"))
    flush(database, "w1", RequestProgress(lease, (), (a_finished_choice(),), ends=True))

    check_shown(database, steps)
    assert [row["worker_id"] for row in shown(database)] == ["w0"] * 4 + ["w1"] * 5
    check_sums(database)


def test_sums_differ_from_the_measured_ones_by_rounding_alone(
    database: Database,
) -> None:
    steps = some(random.Random(3), 200)
    exact = sum(step.step_ms / step.batch_sequences for step in steps[1:])
    plain = [s.emitted_tokens * s.plain_step_ms / s.batch_sequences for s in steps if s.plain_step_ms is not None]

    decode(database, steps)

    with database.read() as session:
        share = func.sum(1.0 * DecodeStep.step_ms / DecodeStep.batch_sequences)
        seen = session.scalar(select(share).where(DecodeStep.step > 0))
        kept, kept_plain = session.execute(select(func.sum(StepMinute.step_ms), func.sum(StepMinute.plain_ms))).one()
    assert kept == pytest.approx(seen, rel=1e-12)
    assert kept == pytest.approx(exact, abs=200 * 0.005)
    assert kept_plain == pytest.approx(sum(plain), abs=200 * 0.005 * 4)


def test_queries_select_steps_by_any_column(database: Database) -> None:
    """The same query in both shells: no function but those of SQL."""
    steps = some(random.Random(4), 40)
    decode(database, steps)
    with database.read() as session:
        counted = session.execute(
            text(
                "SELECT count(*), sum(emitted_tokens) FROM outputs o"
                " JOIN decode_steps s USING (job_id, request_index, choice_index)"
                " WHERE s.tree_nodes > 0 AND s.decision = 'tree' AND s.step BETWEEN 5 AND 30"
            )
        ).one()
    wanted = [s for s in steps[5:31] if s.tree_nodes and s.decision == "tree"]
    assert tuple(counted) == (len(wanted), sum(s.emitted_tokens for s in wanted))


def test_deleting_a_job_deletes_its_steps(database: Database) -> None:
    decode(database, some(random.Random(5), 5))
    with database.write() as session:
        session.execute(text("DELETE FROM jobs"))
    assert (shown(database), packed(database)) == ([], 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 50_000), st.integers(10**9, 10**9 + 9)), min_size=1, max_size=9))
def test_a_column_is_unpacked_as_it_was(values: list[int | None]) -> None:
    steps = StepColumns()
    for value in values:
        steps.add_row(asdict(a_step(plain_step_ms=None if value is None else value / 100)))
    rows = packed_rows({}, "w1", steps, 0)
    found: list[int | None] = []
    for row in rows:
        found += unpack_optional(row["min_plain_step_ms"], row["plain_step_ms"], row["steps"])
    assert found == values
    assert [row["first_step"] for row in rows] == [sum(r["steps"] for r in rows[:n]) for n in range(len(rows))]


def test_numbers_that_are_none_are_no_smaller_than_the_minimum() -> None:
    assert pack([5, 5]) == (5, None)
    assert pack([5, 7]) == (5, ' "')
    assert unpack(5, ' "', 2) == [5, 7]
    assert pack_optional([None, None]) == (None, None)
    assert unpack_optional(*pack_optional([None, 3, 4]), 3) == [None, 3, 4]
    assert unpack_optional(*pack_optional([3, None]), 2) == [3, None]


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_times_that_are_no_times_end_nothing(value: float) -> None:
    steps = StepColumns.of([a_step(step_ms=value)])
    (row,) = packed_rows({}, "w1", steps, 0)
    assert row["min_step_ms"] in (0, 2**31 - 2)


def test_a_checkpoint_holds_columns_that_stay_the_same_once() -> None:
    steps = StepColumns.of(some(random.Random(6), 10))
    stored = steps.to_json()
    assert StepColumns.from_json(stored) == steps
    assert StepColumns.of(steps.rows()) == steps
    assert StepColumns.of([a_step(), a_step()]).to_json()["drafter"] == "suffix"
