"""The event log of a job: its tokens, ends and errors in commit order, readable from any cursor.

Each transaction that writes a checkpoint, an output or the end of a request takes the job's next event number under the
job's lock, so event numbers follow commit order. A reader is identified by its cursor alone and reads in passes. A pass
delivers what was committed after `base` up to `until`, the newest commit when the pass began: first the checkpoints of
open choices in one page, then ended choices in pages. When a choice ends, its checkpoints are merged into its output,
which keeps their event numbers and sizes: the output delivers only the text committed after `base`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Integer, Select, and_, bindparam, func, literal, select, tuple_
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, repeatable_read
from storage.models import ChoiceOutput, JobRow, Partial, Request
from storage.pausing import shown_status
from storage.progress.flush import merge_pieces
from storage.statuses import ERROR_REQUEST_STATUSES, FINAL_JOB_STATUSES

_TEXT, _END, _FAILURE = range(3)  # values of Position.part
_FIRST_SEQ: Final = 1  # of a choice's first checkpoint; its `started` event has 0


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A position in the event log. Within one commit, events are ordered by request and choice index."""

    number: int  # event number of the commit
    request_index: int = 0
    choice_index: int = 0
    part: int = 0  # the text of a choice comes before its end


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a reader has received: all commits up to `base`, and in a pass a part of the commits up to `until`.

    That part is the checkpoints of all choices that were open at `until`, and the ended choices up to `position`.
    """

    base: int = -1
    until: int = -1  # -1: between two passes
    position: Position = Position(-1)
    status: str | None = None  # job status that the reader has received

    @property
    def newest(self) -> int:
        """Event number of the newest commit of which the reader has received something."""
        return max(self.base, self.until, self.position.number)

    def within(self, end: Cursor) -> Cursor:
        """Return this cursor, or a new reader's if it lies beyond `end`, the end of the log: then it is of another."""
        final = self.status in FINAL_JOB_STATUSES
        return self if self.newest <= end.newest and (not final or self == end) else Cursor()


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One event of a job: text of a choice, the end of a choice, or the error of a request."""

    cursor: Cursor | None  # after this event; None: not resumable here, the next event belongs to the same page
    kind: Literal["tokens", "finished", "failed"]
    custom_id: str
    request_index: int
    choice_index: int
    seq: int
    text: str = ""
    pieces: tuple[tuple[str, str], ...] = ()
    tokens: int = 0
    accepted: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    from_start: bool = False  # holds all text of the choice up to `seq`, not only what is new
    answer_format: dict[str, Any] | None = None  # only if it holds the text from its start


@dataclass(frozen=True, slots=True)
class Page:
    """The next events after a cursor, and the cursor after them."""

    events: tuple[LogEvent, ...]
    cursor: Cursor  # after all of them; with the job's status if the page is complete
    status: str
    complete: bool  # no more events exist yet


def head(session: Session, job_id: str) -> Page:
    """Return the empty page at the end of the log. The job must exist."""
    job = _job(session, job_id)
    return Page((), _end(job, Cursor(until=job.event_number)), job.status, complete=True)


def read(session: Session, job_id: str, since: Cursor, limit: int) -> Page:
    """Return about `limit` events after a cursor. The job must exist."""
    repeatable_read(session)
    job = _job(session, job_id)
    events: list[LogEvent] = []
    if since.until < 0 and since.base < job.event_number:
        written = _open_checkpoints(session, job_id, since.base)
        since = replace(since, until=job.event_number)
        # Only the last one moves the cursor: a reader that disconnects earlier gets all of them again.
        events = [*written[:-1], *(replace(last, cursor=since) for last in written[-1:])]
    found = [] if since.until < 0 else _ended_choices(session, job_id, since, limit)
    position = since.position
    for position, row in found[:limit]:
        events += _events(row, position, since)
    if len(found) > limit:
        return Page(tuple(events), replace(since, position=position), job.status, complete=False)
    if 0 <= since.until < job.event_number:
        return Page(tuple(events), Cursor(since.until, status=since.status), job.status, complete=False)
    return Page(tuple(events), _end(job, replace(since, position=position)), job.status, complete=True)


def ended_requests(session: Session, job_id: str, after: Position, limit: int) -> list[tuple[Position, int]]:
    """Return (position, request index) of up to `limit` requests that ended after a position, in order."""
    rows = session.execute(
        select(Request.event_number, Request.request_index)
        .where(
            Request.job_id == job_id,
            Request.event_number >= after.number,
            tuple_(Request.event_number, Request.request_index)
            > tuple_(literal(after.number, Integer), literal(after.request_index, Integer)),
        )
        .order_by(Request.event_number, Request.request_index)
        .limit(limit)
    )
    return [(Position(int(number or 0), index), index) for number, index in rows]


def _job(session: Session, job_id: str) -> AnyRow:
    return session.execute(_job_query(), {"job_id": job_id}).one()


def _end(job: AnyRow, cursor: Cursor) -> Cursor:
    """Return the cursor of a reader that has received everything.

    While a batch is validating, requests are still added under the job's first event number: the cursor stays.
    """
    if job.status == "validating":
        return replace(cursor, status=job.status)
    return Cursor(job.event_number, status=job.status)


def _open_checkpoints(session: Session, job_id: str, base: int) -> list[LogEvent]:
    """Return the checkpoints of open choices after commit `base`; for a new reader (-1), one event per choice."""
    rows = session.execute(_checkpoint_query(by_choice=base < 0), {"job_id": job_id, "base": base}).all()
    if base >= 0:
        return [_tokens_event([row], first=row.seq <= _FIRST_SEQ) for row in rows]
    groups = groupby(rows, key=lambda row: (row.request_index, row.choice_index))
    return [replace(_tokens_event(list(group), first=True), from_start=True) for _, group in groups]


def _ended_choices(session: Session, job_id: str, since: Cursor, limit: int) -> list[tuple[Position, AnyRow]]:
    """Return what ended in this pass after the position, in order. More than `limit` rows mean another page."""
    rows = [*_outputs(session, job_id, since, limit), *_failures(session, job_id, since, limit)]
    return sorted(rows, key=lambda row: row[0])


def _tokens_event(checkpoints: Sequence[AnyRow], *, first: bool) -> LogEvent:
    last = checkpoints[-1]
    flags = [flag for row in checkpoints for flag in row.accepted]
    return LogEvent(
        cursor=None,
        kind="tokens",
        custom_id=last.custom_id,
        request_index=last.request_index,
        choice_index=last.choice_index,
        seq=last.seq,
        text="".join(row.text for row in checkpoints),
        pieces=tuple(merge_pieces(piece for row in checkpoints for piece in row.pieces)),
        tokens=len(flags),
        accepted=sum(flags),
        answer_format=last.answer_format if first else None,
    )


_PARTIAL_KEY: Final = (Partial.request_index, Partial.choice_index)
_PARTIAL_POSITION: Final = (Partial.event_number, Partial.request_index, Partial.choice_index)
_OUTPUT_POSITION: Final = (ChoiceOutput.event_number, ChoiceOutput.request_index, ChoiceOutput.choice_index)


# Each read of the log runs these queries, and to build one takes longer than to run it: hence the caches.


@cache
def _job_query() -> Select[*tuple[Any, ...]]:
    status = shown_status(JobRow).label("status")
    return select(status, JobRow.event_number).where(JobRow.id == bindparam("job_id"))


@cache
def _checkpoint_query(*, by_choice: bool) -> Select[*tuple[Any, ...]]:
    return (
        select(
            Request.custom_id,
            Request.answer_format,
            Partial.event_number,
            Partial.request_index,
            Partial.choice_index,
            Partial.seq,
            Partial.text,
            Partial.pieces,
            Partial.accepted,
        )
        .join(Request, and_(Request.job_id == Partial.job_id, Request.request_index == Partial.request_index))
        .where(Partial.job_id == bindparam("job_id"), Partial.event_number > bindparam("base"))
        .order_by(*(_PARTIAL_KEY if by_choice else _PARTIAL_POSITION), Partial.seq)
    )


def _outputs(session: Session, job_id: str, since: Cursor, limit: int) -> Iterator[tuple[Position, AnyRow]]:
    for row in session.execute(_output_query(), _parameters(job_id, since, limit)):
        end = Position(row.event_number, row.request_index, row.choice_index, _END)
        if end > since.position:
            yield end, row


def _failures(session: Session, job_id: str, since: Cursor, limit: int) -> Iterator[tuple[Position, AnyRow]]:
    for row in session.execute(_failure_query(), _parameters(job_id, since, limit)):
        end = Position(row.event_number, row.request_index, 0, _FAILURE)
        if end > since.position:
            yield end, row


def _parameters(job_id: str, since: Cursor, limit: int) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "base": since.base,
        "until": since.until,
        "number": since.position.number,
        "request_index": since.position.request_index,
        "choice_index": since.position.choice_index,
        "rows": limit + 2,  # the first may be at the position itself, and is skipped
    }


@cache
def _output_query() -> Select[*tuple[Any, ...]]:
    return (
        select(
            Request.custom_id,
            Request.answer_format,
            ChoiceOutput.event_number,
            ChoiceOutput.request_index,
            ChoiceOutput.choice_index,
            ChoiceOutput.text,
            ChoiceOutput.pieces,
            ChoiceOutput.checkpoints,
            ChoiceOutput.completion_tokens,
            ChoiceOutput.accepted_tokens,
            ChoiceOutput.finish_reason,
            ChoiceOutput.last_seq,
            literal("output").label("source"),
        )
        .join(Request, and_(Request.job_id == ChoiceOutput.job_id, Request.request_index == ChoiceOutput.request_index))
        .where(
            ChoiceOutput.job_id == bindparam("job_id"),
            ChoiceOutput.event_number >= bindparam("number"),
            ChoiceOutput.event_number > bindparam("base"),
            ChoiceOutput.event_number <= bindparam("until"),
            tuple_(*_OUTPUT_POSITION) >= _bound("number", "request_index", "choice_index"),
        )
        .order_by(*_OUTPUT_POSITION)
        .limit(bindparam("rows", type_=Integer))
    )


@cache
def _failure_query() -> Select[*tuple[Any, ...]]:
    last_seq = (
        select(func.max(Partial.seq))
        .where(
            Partial.job_id == Request.job_id,
            Partial.request_index == Request.request_index,
            Partial.choice_index == 0,
        )
        .scalar_subquery()
    )
    return (
        select(
            Request.custom_id,
            Request.event_number,
            Request.request_index,
            Request.error_code,
            Request.error_message,
            Request.error_param,
            func.coalesce(last_seq + 1, 0).label("seq"),
            literal("failure").label("source"),
        )
        .where(
            Request.job_id == bindparam("job_id"),
            Request.event_number >= bindparam("number"),
            Request.event_number > bindparam("base"),
            Request.event_number <= bindparam("until"),
            Request.status.in_(ERROR_REQUEST_STATUSES),
            tuple_(Request.event_number, Request.request_index) >= _bound("number", "request_index"),
        )
        .order_by(Request.event_number, Request.request_index)
        .limit(bindparam("rows", type_=Integer))
    )


def _events(row: AnyRow, position: Position, since: Cursor) -> Iterator[LogEvent]:
    if row.source == "failure":
        error = {"code": row.error_code, "message": row.error_message, "param": row.error_param}
        cursor = replace(since, position=position)
        yield LogEvent(cursor, "failed", row.custom_id, row.request_index, 0, row.seq, error=error)
    else:
        yield from _output_events(row, position, since)


def _output_events(row: AnyRow, end: Position, since: Cursor) -> Iterator[LogEvent]:
    """Yield the text of an output that the reader has not received, and the end of the choice."""
    identity = (row.custom_id, row.request_index, row.choice_index)
    text = replace(end, part=_TEXT)
    unread = _unread(row, since)
    if unread is not None and text > since.position:
        chars, tokens, accepted = unread
        yield LogEvent(
            replace(since, position=text),
            "tokens",
            *identity,
            seq=row.last_seq - 1,
            text=row.text[chars:],
            pieces=tuple(_cut(row.pieces, chars)),
            tokens=row.completion_tokens - tokens,
            accepted=row.accepted_tokens - accepted,
            from_start=tokens == 0,
            answer_format=row.answer_format if tokens == 0 else None,
        )
    cursor = replace(since, position=end)
    yield LogEvent(cursor, "finished", *identity, seq=row.last_seq, finish_reason=row.finish_reason)


def _unread(row: AnyRow, since: Cursor) -> tuple[int, int, int] | None:
    """Return how much of an output the reader has: characters, tokens, accepted tokens; None: all of it."""
    known = [0, 0, 0]
    for number, _, *sizes in row.checkpoints or ():
        if number > since.base:
            return known[0], known[1], known[2]
        known = [sum(pair) for pair in zip(known, sizes, strict=True)]
    # Outputs written before `checkpoints` existed are delivered whole.
    return (0, 0, 0) if row.checkpoints is None and row.completion_tokens else None


def _cut(pieces: Sequence[Sequence[str]], chars: int) -> Iterator[tuple[str, str]]:
    """Yield the pieces after the first `chars` characters."""
    for text, source in pieces:
        if len(text) > chars:
            yield text[chars:], source
        chars = max(0, chars - len(text))


def _bound(*names: str) -> ColumnElement[Any]:
    return tuple_(*(bindparam(name, type_=Integer) for name in names))
