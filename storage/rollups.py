"""Sums of `decode_steps`, added up as its rows are written, so that statistics read thousands of rows and not millions.

Each sum is one INSERT … SELECT … GROUP BY over the steps of the choices that have just got their outputs, added to what
is there. So at any time the sums say what the same SELECT over all steps would say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, case, func, select, text
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage.dialect import insert_into, is_one_of, whole
from storage.models import Base, DecodeStep, StepBatch, StepDepth, StepExpectation, StepMinute, StepRank

ChoiceKey = tuple[str, int, int]  # (job_id, request_index, choice_index)

_CHOICE: Final = (DecodeStep.job_id, DecodeStep.request_index, DecodeStep.choice_index)
_LATER: Final = DecodeStep.step > 0
_COMPARED: Final = DecodeStep.plain_step_ms.is_not(None)
_DRAFTER: Final = func.coalesce(DecodeStep.drafter, "")
_SHARE: Final = 1.0 * DecodeStep.step_ms / DecodeStep.batch_sequences
# A plain step gives every sequence of the batch one token.
_PLAIN: Final = DecodeStep.emitted_tokens * DecodeStep.plain_step_ms / DecodeStep.batch_sequences


def add_steps(session: Session, choices: Collection[ChoiceKey], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add the steps of choices whose rows have just been inserted; `rows` are the same rows."""
    among = is_one_of(_CHOICE, choices)
    for model, keys, sums, condition in _plans(session):
        _add(session, model, keys, sums, and_(among, condition))
    _add_ranks(session, rows)


def _plans(session: Session) -> Sequence[tuple[type[Base], dict[str, Any], dict[str, Any], ColumnElement[bool]]]:
    """Return every rollup: its table, what it groups by, what it adds up, and which steps it is about."""
    minute = whole(session, DecodeStep.ended_at / 60) * 60
    quarter = whole(session, 4 * func.coalesce(DecodeStep.expected_accepted, 0.0))
    job = {"job_id": DecodeStep.job_id, "drafter": _DRAFTER}
    return (
        (
            StepMinute,
            job | {"minute": minute, "worker_id": DecodeStep.worker_id, "decision": _decision()},
            _minute_sums(),
            DecodeStep.step >= 0,
        ),
        (StepBatch, job | {"batch_sequences": DecodeStep.batch_sequences}, _batch_sums(), _LATER),
        (
            StepDepth,
            job | {"tree_depth": DecodeStep.tree_depth, "accepted_tokens": DecodeStep.accepted_tokens},
            {"steps": func.count()},
            _LATER,
        ),
        (StepExpectation, job | {"quarter": quarter}, _expectation_sums(), DecodeStep.tree_nodes > 0),
    )


def _decision() -> ColumnElement[str]:
    return func.coalesce(DecodeStep.decision, "")


def _minute_sums() -> dict[str, Any]:
    first = DecodeStep.step == 0
    return {
        "first_steps": _count(first),
        "first_tokens": _sum(DecodeStep.emitted_tokens, first),
        "steps": _count(_LATER),
        "tokens": _sum(DecodeStep.emitted_tokens, _LATER),
        "tree_nodes": _sum(DecodeStep.tree_nodes, _LATER),
        "accepted_tokens": _sum(DecodeStep.accepted_tokens, _LATER),
        "expected_accepted": _sum(DecodeStep.expected_accepted, _LATER, 0.0),
        "draft_ms": _sum(1.0 * DecodeStep.draft_ms / DecodeStep.batch_sequences, _LATER, 0.0),
        "verify_ms": _sum(1.0 * DecodeStep.verify_ms / DecodeStep.batch_sequences, _LATER, 0.0),
        "step_ms": _sum(_SHARE, _LATER, 0.0),
        "compared_steps": _count(_COMPARED),
        "compared_tokens": _sum(DecodeStep.emitted_tokens, _COMPARED),
        "compared_ms": _sum(_SHARE, _COMPARED, 0.0),
        "plain_ms": _sum(_PLAIN, _COMPARED, 0.0),
    }


def _batch_sums() -> dict[str, Any]:
    return {
        "steps": func.count(),
        "tokens": func.sum(DecodeStep.emitted_tokens),
        "tree_nodes": func.sum(DecodeStep.tree_nodes),
        "step_ms": func.sum(_SHARE),
    }


def _expectation_sums() -> dict[str, Any]:
    return {
        "steps": func.count(),
        "expected_accepted": func.coalesce(func.sum(DecodeStep.expected_accepted), 0.0),
        "accepted_tokens": func.sum(DecodeStep.accepted_tokens),
    }


def _count(which: ColumnElement[bool]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(case((which, 1), else_=0)), 0)


def _sum(value: ColumnElement[Any] | InstrumentedAttribute[Any], which: ColumnElement[bool], zero: float = 0) -> Any:
    return func.coalesce(func.sum(case((which, value), else_=None)), zero)


def _add(
    session: Session, model: type[Base], keys: dict[str, Any], sums: dict[str, Any], which: ColumnElement[bool]
) -> None:
    # By their places: where an expression holds a bound value, PostgreSQL takes its repetition for another one.
    places = [text(str(place)) for place in range(1, len(keys) + 1)]
    # In the order of the keys: two transactions that add to the same rows must not wait for each other.
    rows: Select[Any] = select(*keys.values(), *sums.values()).where(which).group_by(*places).order_by(*places)
    statement = insert_into(session, model).from_select([*keys, *sums], rows)
    session.execute(_adding(statement, model, keys, sums))


def _add_ranks(session: Session, rows: Iterable[Mapping[str, Any]]) -> None:
    """Count the ranks of the children that were tried and drawn."""
    tried: Counter[tuple[str, str, int]] = Counter()
    accepted: Counter[tuple[str, str, int]] = Counter()
    for row in rows:
        for children, drawn in row["reached"] or ():
            place = (row["job_id"], row["drafter"] or "")
            tried.update((*place, rank) for rank in range(children))
            if drawn is not None:
                accepted[(*place, drawn)] += 1
    if not tried:
        return
    names = ("job_id", "drafter", "child_rank")
    values = [
        dict(zip(names, key, strict=True)) | {"tried": tried[key], "accepted": accepted[key]} for key in sorted(tried)
    ]
    statement = insert_into(session, StepRank)
    session.execute(_adding(statement, StepRank, names, ("tried", "accepted")), values)


def _adding(statement: Any, model: type[Base], keys: Iterable[str], sums: Iterable[str]) -> Any:
    """Return an INSERT that adds to the rows that are there already."""
    columns = model.__table__.c
    added = {name: columns[name] + statement.excluded[name] for name in sums}
    return statement.on_conflict_do_update(index_elements=list(keys), set_=added)
