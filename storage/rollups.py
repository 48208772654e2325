"""Rollups: sums of `decode_steps`, updated as steps are written, so that statistics read few rows.

Each rollup is one upsert, INSERT … SELECT … GROUP BY, over the steps of the choices that this transaction finishes. So
the sums always equal the same SELECT over all steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, case, func, select, text
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage.dialect import insert_into, is_one_of, round_down
from storage.models import Base, DecodeStep, StepBatchSize, StepDepth, StepExpectation, StepMinute, StepRank

ChoiceKey = tuple[str, int, int]  # (job_id, request_index, choice_index)

_CHOICE: Final = (DecodeStep.job_id, DecodeStep.request_index, DecodeStep.choice_index)
_LATER: Final = DecodeStep.step > 0
_COMPARED: Final = DecodeStep.plain_step_ms.is_not(None)
_DRAFTER: Final = func.coalesce(DecodeStep.drafter, "")
_SHARE: Final = 1.0 * DecodeStep.step_ms / DecodeStep.batch_sequences
# A plain step emits one token per sequence: each token costs plain_step_ms / batch_sequences.
_PLAIN: Final = DecodeStep.emitted_tokens * DecodeStep.plain_step_ms / DecodeStep.batch_sequences


def add_steps(session: Session, choices: Collection[ChoiceKey], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add the steps of choices that were just inserted; `rows` are these steps."""
    among = is_one_of(_CHOICE, choices)
    for model, keys, sums, condition in _plans(session):
        _add(session, model, keys, sums, and_(among, condition))
    _add_ranks(session, rows)


def _plans(session: Session) -> Sequence[tuple[type[Base], dict[str, Any], dict[str, Any], ColumnElement[bool]]]:
    """Return (table, group keys, sums, condition on steps) of each rollup."""
    minute = round_down(session, DecodeStep.ended_at / 60) * 60
    quarter = round_down(session, 4 * func.coalesce(DecodeStep.expected_accepted, 0.0))
    job = {"job_id": DecodeStep.job_id, "drafter": _DRAFTER}
    return (
        (
            StepMinute,
            job | {"minute": minute, "worker_id": DecodeStep.worker_id, "decision": _decision()},
            _minute_sums(),
            DecodeStep.step >= 0,
        ),
        (StepBatchSize, job | {"batch_sequences": DecodeStep.batch_sequences}, _batch_sums(), _LATER),
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
    # GROUP BY column numbers: PostgreSQL takes a repeated expression with bound values for a different one.
    positions = [text(str(position)) for position in range(1, len(keys) + 1)]
    # Ordered by key, so that two transactions that update the same rows can't deadlock.
    rows: Select[Any] = select(*keys.values(), *sums.values()).where(which).group_by(*positions).order_by(*positions)
    statement = insert_into(session, model).from_select([*keys, *sums], rows)
    session.execute(_adding(statement, model, keys, sums))


def _add_ranks(session: Session, rows: Iterable[Mapping[str, Any]]) -> None:
    """Count the ranks of the draft children that were reached and accepted."""
    tried: Counter[tuple[str, str, int]] = Counter()
    accepted: Counter[tuple[str, str, int]] = Counter()
    for row in rows:
        for children, accepted_rank in row["reached"] or ():
            key = (row["job_id"], row["drafter"] or "")
            tried.update((*key, rank) for rank in range(children))
            if accepted_rank is not None:
                accepted[(*key, accepted_rank)] += 1
    if not tried:
        return
    names = ("job_id", "drafter", "child_rank")
    values = [
        dict(zip(names, key, strict=True)) | {"tried": tried[key], "accepted": accepted[key]} for key in sorted(tried)
    ]
    statement = insert_into(session, StepRank)
    session.execute(_adding(statement, StepRank, names, ("tried", "accepted")), values)


def _adding(statement: Any, model: type[Base], keys: Iterable[str], sums: Iterable[str]) -> Any:
    """Return an upsert that adds to existing rows."""
    columns = model.__table__.c
    added = {name: columns[name] + statement.excluded[name] for name in sums}
    return statement.on_conflict_do_update(index_elements=list(keys), set_=added)
