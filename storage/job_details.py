"""Read model of the dashboard's job page: requests with their texts, errors, and draft trees.

Each query reads one page of rows, for a job of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, position_of
from storage.models import ChoiceOutput, DecodeStep, DraftTree, Partial, Request
from storage.progress.flush import merge_pieces

Pieces = tuple[tuple[str, str], ...]  # (text, "draft" | "target")

_MAX_TEXT_CHARS: Final = 20_000  # of one text
_MAX_PROMPT_CHARS: Final = 500


@dataclass(frozen=True, slots=True)
class ChoiceDetails:
    """One choice, open or finished."""

    choice_index: int
    pieces: Pieces
    tokens: int
    accepted: int
    finish_reason: str | None
    numerics: str | None = None  # what fixed its bits (storage.numerics), of a finished one


@dataclass(frozen=True, slots=True)
class RequestDetails:
    """One request with the text of its choices."""

    request_index: int
    custom_id: str
    status: str
    error_code: str | None
    error_message: str | None
    prompt: str  # truncated
    choices: tuple[ChoiceDetails, ...]
    grammar: str | None = None  # what binds its texts: json_schema, json_object, regex, choice or grammar


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """How many requests of a job failed with one message; None: with any other message of this code."""

    code: str
    message: str | None  # prefixed with the field
    requests: int


@dataclass(frozen=True, slots=True)
class TreeKey:
    """Key of a stored draft tree, and the size of the tree."""

    request_index: int
    choice_index: int
    step: int
    tree_nodes: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TreeDetails:
    """A stored draft tree and its decoding step."""

    nodes: tuple[tuple[int, int, str, float, bool], ...]  # (parent, token id, text, value, accepted); root first
    bonus: str
    step: Mapping[str, Any]  # columns of `decode_steps`


def requests(
    session: Session, job_id: str, statuses: Sequence[str] = (), after: int = -1, limit: int = 20
) -> list[RequestDetails]:
    """Return up to `limit` requests with an index above `after`; empty `statuses`: of any status."""
    query = select(*_REQUEST).where(Request.job_id == job_id, Request.request_index > after)
    if statuses:
        query = query.where(Request.status.in_(statuses))
    rows = session.execute(query.order_by(Request.request_index).limit(limit)).all()
    return _with_texts(session, job_id, rows)


def running(session: Session, job_id: str, limit: int) -> list[RequestDetails]:
    """Return the first `limit` running requests of a job."""
    query = select(*_REQUEST).where(Request.job_id == job_id, Request.status == "running")
    return _with_texts(session, job_id, session.execute(query.order_by(Request.request_index).limit(limit)).all())


def errors(session: Session, job_id: str, limit: int = 20) -> list[ErrorCount]:
    """Return the `limit` most frequent errors by code, field and message, then the rest by code."""
    count = func.count().label("requests")
    of_job = (Request.job_id == job_id, Request.error_code.is_not(None))
    kinds = select(Request.error_code, Request.error_param, _rule(session).label("rule")).where(*of_job).subquery()
    ranked = select(*kinds.c, count).group_by(*kinds.c).order_by(count.desc(), *kinds.c).limit(limit)
    found = [
        ErrorCount(str(row.error_code), _with_field(row.error_param, row.rule or ""), row.requests)
        for row in session.execute(ranked)
    ]
    left = Counter[str]()
    by_code = select(Request.error_code, count).where(*of_job).group_by(Request.error_code)
    for code, number in session.execute(by_code):
        left[str(code)] = number
    for error in found:
        left[error.code] -= error.requests
    return found + [ErrorCount(code, None, number) for code, number in left.most_common() if number]


def tree_keys(session: Session, job_id: str) -> list[TreeKey]:
    """Return the keys and sizes of the stored trees of a job's ended requests."""
    columns = (DraftTree.request_index, DraftTree.choice_index, DraftTree.step)
    keys = session.execute(select(*columns).where(DraftTree.job_id == job_id).order_by(*columns)).all()
    among = DecodeStep.request_index.in_({key.request_index for key in keys})  # few requests have trees
    names = (DecodeStep.request_index, DecodeStep.choice_index, DecodeStep.step)
    rows = session.execute(
        select(*names, DecodeStep.tree_nodes, DecodeStep.accepted_tokens).where(DecodeStep.job_id == job_id, among)
    )
    sizes = {tuple(row[:3]): tuple(row[3:]) for row in rows}
    return [TreeKey(*key, *sizes[tuple(key)]) for key in keys if tuple(key) in sizes]


def tree(session: Session, job_id: str, key: TreeKey) -> TreeDetails | None:
    """Return a stored tree with its step; None if it does not exist."""
    where = [getattr(DraftTree, name) == getattr(key, name) for name in ("request_index", "choice_index", "step")]
    row = session.execute(select(DraftTree.nodes, DraftTree.bonus).where(DraftTree.job_id == job_id, *where)).first()
    if row is None:
        return None
    same = [getattr(DecodeStep, name) == getattr(key, name) for name in ("request_index", "choice_index", "step")]
    step = session.execute(select(*_STEP).where(DecodeStep.job_id == job_id, *same)).one()
    return TreeDetails(tuple(tuple(node) for node in row.nodes), row.bonus, dict(step._mapping))


_REQUEST: Final = (
    Request.request_index,
    Request.custom_id,
    Request.status,
    Request.error_code,
    Request.error_message,
    Request.body,
)
_STEP: Final = (
    DecodeStep.tree_nodes,
    DecodeStep.tree_depth,
    DecodeStep.accepted_tokens,
    DecodeStep.emitted_tokens,
    DecodeStep.expected_accepted,
    DecodeStep.draft_ms,
    DecodeStep.verify_ms,
    DecodeStep.step_ms,
    DecodeStep.batch_sequences,
    DecodeStep.drafter,
    DecodeStep.decision,
)


def _with_texts(session: Session, job_id: str, rows: Sequence[AnyRow]) -> list[RequestDetails]:
    indexes = [row.request_index for row in rows]
    texts = _partial_texts(session, job_id, indexes) | _output_texts(session, job_id, indexes)
    return [
        RequestDetails(
            request_index=row.request_index,
            custom_id=row.custom_id,
            status=row.status,
            error_code=row.error_code,
            error_message=row.error_message,
            prompt=_prompt(row.body),
            choices=tuple(text for (index, _), text in sorted(texts.items()) if index == row.request_index),
            grammar=((row.body or {}).get("grammar") or {}).get("kind"),
        )
        for row in rows
    ]


def _output_texts(session: Session, job_id: str, indexes: Sequence[int]) -> dict[tuple[int, int], ChoiceDetails]:
    rows = session.execute(
        select(
            ChoiceOutput.request_index,
            ChoiceOutput.choice_index,
            ChoiceOutput.pieces,
            ChoiceOutput.completion_tokens,
            ChoiceOutput.accepted_tokens,
            ChoiceOutput.finish_reason,
            ChoiceOutput.numerics,
        ).where(and_(ChoiceOutput.job_id == job_id, ChoiceOutput.request_index.in_(indexes)))
    )
    return {(row[0], row[1]): ChoiceDetails(row[1], cut(row.pieces), *row[3:]) for row in rows}


def _partial_texts(session: Session, job_id: str, indexes: Sequence[int]) -> dict[tuple[int, int], ChoiceDetails]:
    rows = session.execute(
        select(Partial.request_index, Partial.choice_index, Partial.pieces, Partial.accepted)
        .where(Partial.job_id == job_id, Partial.request_index.in_(indexes))
        .order_by(Partial.request_index, Partial.choice_index, Partial.seq)
    )
    return {key: _partial_text(key[1], list(group)) for key, group in groupby(rows, lambda row: (row[0], row[1]))}


def _partial_text(choice: int, rows: Sequence[AnyRow]) -> ChoiceDetails:
    flags = [flag for row in rows for flag in row.accepted]
    pieces = merge_pieces(piece for row in rows for piece in row.pieces)
    return ChoiceDetails(choice, cut(pieces), len(flags), sum(flags), None)


def cut(pieces: Sequence[Sequence[str]], chars: int = _MAX_TEXT_CHARS) -> Pieces:
    """Return the first `chars` characters of a text; the piece " […]" marks a cut."""
    taken: list[tuple[str, str]] = []
    for text, source in pieces:
        if len(text) > chars:
            return (*taken, (text[:chars], source), (" […]", "target"))
        taken.append((text, source))
        chars -= len(text)
    return tuple(taken)


def _rule(session: Session) -> ColumnElement[str]:
    """Return an error message without its line or index in the job, so that equal errors are counted together."""
    message = Request.error_message
    has_position = or_(message.like("line %: %"), message.like("requests[%: %"))
    return case((has_position, func.substr(message, position_of(session, message, ": ") + 2)), else_=message)


def _with_field(param: str | None, rule: str) -> str:
    return f"{param}: {rule}" if param else rule


def _prompt(body: Mapping[str, Any] | None) -> str:
    """Return the prompt, or the last message of the conversation, truncated."""
    if body is None:
        return ""
    messages = body.get("messages")
    text = messages[-1].get("content", "") if messages else body.get("prompt")
    return str(text or "")[:_MAX_PROMPT_CHARS]
