"""The story of a job in the order in which it was committed, told from any place in it.

Every transaction that writes something readers are told of (a checkpoint, an output, the end of a request) takes the
job's next event number under the job's lock, so the numbers are in the order of the commits. A reader is known by its
cursor alone. It is told the news in passes: everything up to a commit is behind it (the base), and it is told what
stands between that and the newest commit (the floor): first the checkpoints of what is still being written, in one
page, then what has ended, in pages. Checkpoints move into the output of their choice, and an output knows them; so
whatever happens between two reads, an output brings what came after the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Integer, and_, func, literal, select, tuple_
from sqlalchemy.orm import Session

from storage.dialect import AnyRow, one_state
from storage.models import Job, Output, Partial, Request
from storage.progress_writes import merge_pieces
from storage.statuses import ERROR_REQUEST_STATUSES, FINAL_JOB_STATUSES

_TEXT, _END, _FAILURE = range(3)  # parts of a place


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A place in the story: within one commit, requests and choices follow their indexes."""

    number: int
    request_index: int = 0
    choice_index: int = 0
    part: int = 0  # text before the end of its choice


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a reader has been told: all commits up to `base`, and in a pass up to `floor` a part of what came since.

    In a pass it knows the checkpoints of what was still being written at the floor, and what ended up to a place.
    """

    base: int = -1
    floor: int = -1  # none: between two passes
    place: Place = Place(-1)
    status: str | None = None  # of the job

    @property
    def newest(self) -> int:
        """The newest commit it knows of."""
        return max(self.base, self.floor, self.place.number)

    def within(self, end: Cursor) -> Cursor:
        """Return this cursor if it can be of the story that ends there, else a new reader's."""
        final = self.status in FINAL_JOB_STATUSES
        return self if self.newest <= end.newest and (not final or self == end) else Cursor()


@dataclass(frozen=True, slots=True)
class Passage:
    """One thing to tell: text of a choice, its end, or why a request has no result."""

    cursor: Cursor | None  # of a reader that was told it; none: what follows belongs to it
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
    from_start: bool = False  # all text of the choice up to `seq`, whatever the reader has


@dataclass(frozen=True, slots=True)
class Page:
    """Some passages behind a cursor."""

    passages: tuple[Passage, ...]
    cursor: Cursor  # of a reader that was told all of them; with the status of the job if the page is complete
    status: str
    complete: bool  # there was nothing more


def where_it_stands(session: Session, job_id: str) -> Page:
    """Return the empty page behind everything. The job must exist."""
    job = _job(session, job_id)
    return Page((), _end(job, Cursor(floor=job.event_number)), job.status, complete=True)


def read(session: Session, job_id: str, since: Cursor, limit: int) -> Page:
    """Return up to about `limit` passages behind a cursor of this job's story. The job must exist."""
    one_state(session)
    job = _job(session, job_id)
    passages: list[Passage] = []
    if since.floor < 0 and since.base < job.event_number:
        written = _what_is_being_written(session, job_id, since.base)
        since = replace(since, floor=job.event_number)
        # Only with the last of them are they all told: a reader that is cut off before is told them again.
        passages = [*written[:-1], *(replace(last, cursor=since) for last in written[-1:])]
    found = [] if since.floor < 0 else _what_ended(session, job_id, since, limit)
    told = since.place
    for told, row in found[:limit]:
        passages += _passages(row, told, since)
    if len(found) > limit:
        return Page(tuple(passages), replace(since, place=told), job.status, complete=False)
    if 0 <= since.floor < job.event_number:
        return Page(tuple(passages), Cursor(since.floor, status=since.status), job.status, complete=False)
    return Page(tuple(passages), _end(job, replace(since, place=told)), job.status, complete=True)


def ended(session: Session, job_id: str, after: Place, limit: int) -> list[tuple[Place, int]]:
    """Return requests of a job in the order in which they ended, from behind a place: (its place, request index)."""
    rows = session.execute(
        select(Request.event_number, Request.request_index)
        .where(
            Request.job_id == job_id,
            Request.event_number >= after.number,
            tuple_(Request.event_number, Request.request_index) > _bound(after.number, after.request_index),
        )
        .order_by(Request.event_number, Request.request_index)
        .limit(limit)
    )
    return [(Place(int(number or 0), index), index) for number, index in rows]


def _job(session: Session, job_id: str) -> AnyRow:
    return session.execute(select(Job.status, Job.event_number).where(Job.id == job_id)).one()


def _end(job: AnyRow, told: Cursor) -> Cursor:
    """Return the cursor of a reader that was told all there is.

    While a job's input is read, requests are still being added, under the number that was there from the start.
    """
    if job.status == "validating":
        return replace(told, status=job.status)
    return Cursor(job.event_number, status=job.status)


def _what_is_being_written(session: Session, job_id: str, base: int) -> list[Passage]:
    """Return the checkpoints behind a commit of every choice that has not ended: to a new reader as one text each."""
    query = _checkpoint_query(job_id).where(Partial.event_number > base)
    if base >= 0:
        return [_written([row]) for row in session.execute(query.order_by(*_PARTIAL_PLACE, Partial.seq))]
    rows = session.execute(query.order_by(*_PARTIAL_KEY, Partial.seq)).all()
    groups = groupby(rows, key=lambda row: (row.request_index, row.choice_index))
    return [replace(_written(list(group)), from_start=True) for _, group in groups]


def _what_ended(session: Session, job_id: str, since: Cursor, limit: int) -> list[tuple[Place, AnyRow]]:
    """Return what ended in this pass behind the place, in order; one more than the limit shows that there is more."""
    rows = [*_outputs(session, job_id, since, limit), *_failures(session, job_id, since, limit)]
    return sorted(rows, key=lambda row: row[0])


def _written(checkpoints: Sequence[AnyRow]) -> Passage:
    last = checkpoints[-1]
    flags = [flag for row in checkpoints for flag in row.accepted]
    return Passage(
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
    )


_PARTIAL_KEY: Final = (Partial.request_index, Partial.choice_index)
_PARTIAL_PLACE: Final = (Partial.event_number, Partial.request_index, Partial.choice_index)
_OUTPUT_PLACE: Final = (Output.event_number, Output.request_index, Output.choice_index)


def _checkpoint_query(job_id: str) -> Any:
    return (
        select(
            Request.custom_id,
            Partial.event_number,
            Partial.request_index,
            Partial.choice_index,
            Partial.seq,
            Partial.text,
            Partial.pieces,
            Partial.accepted,
        )
        .join(Request, and_(Request.job_id == Partial.job_id, Request.request_index == Partial.request_index))
        .where(Partial.job_id == job_id)
    )


def _outputs(session: Session, job_id: str, since: Cursor, limit: int) -> Iterator[tuple[Place, AnyRow]]:
    place = since.place
    query = (
        select(
            Request.custom_id,
            Output.event_number,
            Output.request_index,
            Output.choice_index,
            Output.text,
            Output.pieces,
            Output.checkpoints,
            Output.completion_tokens,
            Output.accepted_tokens,
            Output.finish_reason,
            Output.last_seq,
            literal("output").label("source"),
        )
        .join(Request, and_(Request.job_id == Output.job_id, Request.request_index == Output.request_index))
        .where(
            Output.job_id == job_id,
            Output.event_number >= place.number,
            Output.event_number > since.base,
            Output.event_number <= since.floor,
            tuple_(*_OUTPUT_PLACE) >= _bound(place.number, place.request_index, place.choice_index),
        )
        .order_by(*_OUTPUT_PLACE)
        .limit(limit + 2)  # the first may have been told to its end
    )
    for row in session.execute(query):
        end = Place(row.event_number, row.request_index, row.choice_index, _END)
        if end > place:
            yield end, row


def _failures(session: Session, job_id: str, since: Cursor, limit: int) -> Iterator[tuple[Place, AnyRow]]:
    place = since.place
    last_seq = (
        select(func.max(Partial.seq))
        .where(
            Partial.job_id == Request.job_id,
            Partial.request_index == Request.request_index,
            Partial.choice_index == 0,
        )
        .scalar_subquery()
    )
    query = (
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
            Request.job_id == job_id,
            Request.event_number >= place.number,
            Request.event_number > since.base,
            Request.event_number <= since.floor,
            Request.status.in_(ERROR_REQUEST_STATUSES),
            tuple_(Request.event_number, Request.request_index) >= _bound(place.number, place.request_index),
        )
        .order_by(Request.event_number, Request.request_index)
        .limit(limit + 2)
    )
    for row in session.execute(query):
        end = Place(row.event_number, row.request_index, 0, _FAILURE)
        if end > place:
            yield end, row


def _passages(row: AnyRow, place: Place, since: Cursor) -> Iterator[Passage]:
    if row.source == "failure":
        error = {"code": row.error_code, "message": row.error_message, "param": row.error_param}
        cursor = replace(since, place=place)
        yield Passage(cursor, "failed", row.custom_id, row.request_index, 0, row.seq, error=error)
    else:
        yield from _output_passages(row, place, since)


def _output_passages(row: AnyRow, end: Place, since: Cursor) -> Iterator[Passage]:
    """Yield the text of an output that the reader does not know, and its end."""
    identity = (row.custom_id, row.request_index, row.choice_index)
    text = replace(end, part=_TEXT)
    untold = _untold(row, since)
    if untold is not None and text > since.place:
        chars, tokens, accepted = untold
        yield Passage(
            replace(since, place=text),
            "tokens",
            *identity,
            seq=row.last_seq - 1,
            text=row.text[chars:],
            pieces=tuple(_cut(row.pieces, chars)),
            tokens=row.completion_tokens - tokens,
            accepted=row.accepted_tokens - accepted,
            from_start=tokens == 0,
        )
    cursor = replace(since, place=end)
    yield Passage(cursor, "finished", *identity, seq=row.last_seq, finish_reason=row.finish_reason)


def _untold(row: AnyRow, since: Cursor) -> tuple[int, int, int] | None:
    """Return how much of an output the reader knows: characters, tokens, accepted ones; None if it knows everything."""
    known = [0, 0, 0]
    for number, _, *sizes in row.checkpoints or ():
        if number > since.base:
            return known[0], known[1], known[2]
        known = [sum(pair) for pair in zip(known, sizes, strict=True)]
    # Outputs from before checkpoints were noted were told as one.
    return (0, 0, 0) if row.checkpoints is None and row.completion_tokens else None


def _cut(pieces: Sequence[Sequence[str]], chars: int) -> Iterator[tuple[str, str]]:
    """Yield the pieces behind so many characters."""
    for text, source in pieces:
        if len(text) > chars:
            yield text[chars:], source
        chars = max(0, chars - len(text))


def _bound(*values: int) -> ColumnElement[Any]:
    return tuple_(*(literal(value, Integer) for value in values))
