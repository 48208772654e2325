"""Rollups: sums of `decode_steps`, updated as steps are written, so that statistics read few rows.

A flush adds up the steps of the choices that it finishes and upserts a few rows. So the sums always equal a SELECT over
all steps of the view.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import repeat
from typing import Any, Final, TypeVar

from sqlalchemy import Insert
from sqlalchemy.orm import Session

from storage.dialect import dialect_of, insert_for
from storage.models import Base, StepBatchSize, StepDepth, StepExpectation, StepMinute, StepRank
from storage.steps.columns import EXPECTED_UNITS, MS_UNITS, StepColumns, reached_nodes

ChoiceSteps = tuple[str, Sequence[tuple[str, StepColumns]]]  # job id, and (worker id, steps) in order from step 0

_KEYS: Final[Mapping[type[Base], tuple[str, ...]]] = {
    StepMinute: ("job_id", "minute", "worker_id", "drafter", "decision"),
    StepBatchSize: ("job_id", "drafter", "batch_sequences"),
    StepDepth: ("job_id", "drafter", "tree_depth", "accepted_tokens"),
    StepExpectation: ("job_id", "drafter", "quarter"),
    StepRank: ("job_id", "drafter", "child_rank"),
}
_SUMS: Final[Mapping[type[Base], tuple[str, ...]]] = {
    StepMinute: (
        "first_steps",
        "first_tokens",
        "steps",
        "tokens",
        "tree_nodes",
        "accepted_tokens",
        "expected_accepted",
        "draft_ms",
        "verify_ms",
        "step_ms",
        "compared_steps",
        "compared_tokens",
        "compared_ms",
        "plain_ms",
    ),
    StepBatchSize: ("steps", "tokens", "tree_nodes", "step_ms"),
    StepDepth: ("steps",),
    StepExpectation: ("steps", "expected_accepted", "accepted_tokens"),
    StepRank: ("tried", "accepted"),
}

Key = tuple[Any, ...]
Value = TypeVar("Value")
_Sums = defaultdict[Key, list[float]]


def add_steps(session: Session, choices: Iterable[ChoiceSteps]) -> None:
    """Add the steps of choices that were just inserted."""
    sums = {model: _zeros(len(names)) for model, names in _SUMS.items()}
    depths, reached = Counter[Key](), Counter[Key]()
    for job_id, parts in choices:
        first = True
        for worker_id, steps in parts:
            _add(sums, job_id, worker_id, steps, first)
            later = slice(int(first), None)
            columns = (_drafters(steps)[later], steps.tree_depth[later], steps.accepted_tokens[later])
            depths.update(zip(repeat(job_id), *columns, strict=False))
            reached.update(zip(repeat(job_id), _drafters(steps), steps.reached, strict=False))
            first = False
    for key, count in depths.items():
        sums[StepDepth][key][0] += count
    _add_ranks(sums[StepRank], reached)
    for model, rows in sums.items():
        if rows:
            _upsert(session, model, rows)


def _zeros(length: int) -> _Sums:
    return defaultdict(lambda: [0] * length)


def _add(sums: Mapping[type[Base], _Sums], job_id: str, worker_id: str, steps: StepColumns, first: bool) -> None:
    """Add the steps of one worker; `first`: they begin with step 0, the token from prefill."""
    drafters = _drafters(steps)
    for (minute, drafter, decision, batch), positions in _groups(steps, drafters).items():
        minute_sums = sums[StepMinute][job_id, minute, worker_id, drafter, decision]
        if first and positions[0] == 0:
            del positions[0]
            _increase(minute_sums, (1, steps.emitted_tokens[0], *[0.0] * 8, *_compared(steps, [0], batch)))
        if positions:
            row = _of_group(steps, positions, batch)
            _increase(minute_sums, (0, 0, *row, *_compared(steps, positions, batch)))
            count, tokens, nodes, *_, step_ms = row
            _increase(sums[StepBatchSize][job_id, drafter, batch], (count, tokens, nodes, step_ms))
    _add_expectations(sums[StepExpectation], job_id, drafters, steps)


def _drafters(steps: StepColumns) -> list[str]:
    return [drafter or "" for drafter in steps.drafter]


def _groups(steps: StepColumns, drafters: Sequence[str]) -> Mapping[tuple[int, str, str, int], list[int]]:
    """Return the positions of the steps by (minute, drafter, decision, batch size)."""
    minutes = [ended_ms // 60_000 * 60 for ended_ms in steps.ended_ms]
    decisions = [decision or "" for decision in steps.decision]
    groups: defaultdict[tuple[int, str, str, int], list[int]] = defaultdict(list)
    for position, key in enumerate(zip(minutes, drafters, decisions, steps.batch_sequences, strict=True)):
        groups[key].append(position)
    return groups


def _of_group(steps: StepColumns, positions: Sequence[int], batch: int) -> tuple[float, ...]:
    """Return the sums of `step_minutes` from `steps` to `step_ms`; times are shares of one sequence."""
    expected = [value or 0 for value in _at(steps.expected_accepted, positions)]
    units = MS_UNITS * batch
    return (
        len(positions),
        sum(_at(steps.emitted_tokens, positions)),
        sum(_at(steps.tree_nodes, positions)),
        sum(_at(steps.accepted_tokens, positions)),
        sum(expected) / EXPECTED_UNITS,
        sum(_at(steps.draft_ms, positions)) / units,
        sum(_at(steps.verify_ms, positions)) / units,
        sum(_at(steps.step_ms, positions)) / units,
    )


def _compared(steps: StepColumns, positions: Sequence[int], batch: int) -> tuple[float, ...]:
    """Return the sums of the steps with a plain step time. A plain step emits one token per sequence."""
    comparable = [position for position in positions if steps.plain_step_ms[position] is not None]
    tokens = _at(steps.emitted_tokens, comparable)
    plain = [value or 0 for value in _at(steps.plain_step_ms, comparable)]
    units = MS_UNITS * batch
    spent = sum(_at(steps.step_ms, comparable))
    return (len(comparable), sum(tokens), spent / units, sum(map(operator.mul, tokens, plain)) / units)


def _at(column: Sequence[Value], positions: Sequence[int]) -> Sequence[Value]:
    if len(positions) == len(column):  # all of them
        return column
    if len(positions) < 2:
        return [column[position] for position in positions]
    values: tuple[Value, ...] = operator.itemgetter(*positions)(column)  # faster than a loop
    return values


def _add_expectations(sums: _Sums, job_id: str, drafters: Sequence[str], steps: StepColumns) -> None:
    columns = zip(drafters, steps.tree_nodes, steps.expected_accepted, steps.accepted_tokens, strict=True)
    for drafter, nodes, expected, accepted in columns:
        if nodes:
            row = sums[job_id, drafter, 4 * (expected or 0) // EXPECTED_UNITS]
            row[0] += 1
            row[1] += (expected or 0) / EXPECTED_UNITS
            row[2] += accepted


def _increase(row: list[float], values: Sequence[float]) -> None:
    for place, value in enumerate(values):
        row[place] += value


def _add_ranks(sums: _Sums, reached: Mapping[Key, int]) -> None:
    """Count the ranks of the draft children that were reached and accepted, by (job, drafter, compact `reached`)."""
    for (job_id, drafter, text), count in reached.items():
        for children, accepted_rank in reached_nodes(text or ""):
            for rank in range(children):
                sums[job_id, drafter, rank][0] += count
            if accepted_rank is not None:
                sums[job_id, drafter, accepted_rank][1] += count


def _upsert(session: Session, model: type[Base], sums: _Sums) -> None:
    """Add sums to existing rows. Ordered by key, so that two transactions that update the same rows can't deadlock."""
    keys, names = _KEYS[model], _SUMS[model]
    rows = [dict(zip((*keys, *names), (*key, *sums[key]), strict=True)) for key in sorted(sums)]
    session.connection().execute(_addition(dialect_of(session), model), rows)


@cache  # every flush that ends a choice adds to each table
def _addition(dialect: str, model: type[Base]) -> Insert:
    """Return the statement that adds sums to existing rows or inserts them."""
    statement = insert_for(dialect, model)
    columns = model.__table__.c
    added = {name: columns[name] + statement.excluded[name] for name in _SUMS[model]}
    return statement.on_conflict_do_update(index_elements=list(_KEYS[model]), set_=added)
