"""The story of a job in the order in which it was committed, told from any place in it.

jobs.broadcast -> [story] -> models.  Every transaction that writes something readers are told of (a checkpoint, an
output, the end of a request) takes the job's next event number under the job's lock, so the numbers are in the order of
the commits. A reader is known by its cursor alone: what it has been told is everything up to a place. Rows only move to
higher numbers (checkpoints into their output), and an output knows its checkpoints; so nothing is told twice or left
out, whatever happens between two reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Integer, and_, func, literal, select, tuple_
from sqlalchemy.orm import Session

from storage.flush import merge_pieces
from storage.models import Job, Output, Partial, Request
from storage.sql import AnyRow, one_state

FINAL: Final = ("completed", "failed", "expired", "cancelled")
_WITHOUT_RESULT: Final = ("failed", "expired", "cancelled")
_LAST: Final = 2**31 - 1

_TEXT, _END, _FAILURE = range(3)  # parts of a place


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A place in the story: within one commit, requests and choices follow their indexes."""

    number: int
    request_index: int = 0
    choice_index: int = 0
    part: int = 0  # text before the end of its choice

    @classmethod
    def behind(cls, number: int) -> Place:
        """Return the place behind all that a commit wrote."""
        return cls(number, _LAST, _LAST, _LAST)

    @property
    def is_behind_a_commit(self) -> bool:
        """True for a place that `behind` made."""
        return self.part == _LAST


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a reader has been told: everything up to a place, checkpoints up to `floor`, and a status of the job.

    A new reader is told first what is being written, and then the rest in order; the floor is where it was told so.
    """

    place: Place = Place(-1)
    floor: int = -1
    status: str | None = None

    def within(self, end: Cursor) -> Cursor:
        """Return this cursor if it can be of the story that ends there, else a new reader's."""
        fits = max(self.place.number, self.floor) <= end.place.number
        final = self.status in FINAL
        return self if fits and (not final or self == end) else Cursor()

    @property
    def is_new(self) -> bool:
        """True for a reader that has been told nothing."""
        return self.floor < 0 and self.place.number < 0


@dataclass(frozen=True, slots=True)
class Passage:
    """One thing to tell: text of a choice, its end, or why a request has no result."""

    cursor: Cursor | None  # of a reader that was told it; none: the page must be told to its end
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
    if since.is_new:
        return _what_is_being_written(session, job_id, job)
    found = sorted(
        [
            *_checkpoints(session, job_id, since, limit),
            *_outputs(session, job_id, since, limit),
            *_failures(session, job_id, since, limit),
        ],
        key=lambda row: row[0],
    )
    page = found[:limit]
    told = since.place
    passages: list[Passage] = []
    for place, row in page:
        told = place
        passages += _passages(row, place, since)
    # A row more than the limit, in any of the three, shows that there is more.
    if len(found) > limit:
        return Page(tuple(passages), replace(since, place=told), job.status, complete=False)
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
    return Cursor(Place.behind(job.event_number), status=job.status)


def _what_is_being_written(session: Session, job_id: str, job: AnyRow) -> Page:
    """Return the beginning for a new reader: the text so far of every choice that has not ended."""
    rows = session.execute(_checkpoint_query(job_id).order_by(*_PARTIAL_KEY, Partial.seq)).all()
    passages = tuple(
        _written(list(group)) for _, group in groupby(rows, key=lambda row: (row.request_index, row.choice_index))
    )
    return Page(passages, Cursor(floor=job.event_number), job.status, complete=False)


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
        from_start=True,
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
            literal("checkpoint").label("source"),
        )
        .join(Request, and_(Request.job_id == Partial.job_id, Request.request_index == Partial.request_index))
        .where(Partial.job_id == job_id)
    )


def _checkpoints(session: Session, job_id: str, since: Cursor, limit: int) -> Iterator[tuple[Place, AnyRow]]:
    place = since.place
    query = _checkpoint_query(job_id).where(
        Partial.event_number >= place.number,
        Partial.event_number > since.floor,
        tuple_(*_PARTIAL_PLACE) > _bound(place.number, place.request_index, place.choice_index),
    )
    for row in session.execute(query.order_by(*_PARTIAL_PLACE).limit(limit + 1)):
        yield Place(row.event_number, row.request_index, row.choice_index, _TEXT), row


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
            Request.status.in_(_WITHOUT_RESULT),
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
    if row.source == "checkpoint":
        yield replace(_written([row]), cursor=replace(since, place=place), from_start=False)
    elif row.source == "failure":
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
    # What had ended at the floor was not being written there.
    floor = since.floor if row.event_number > since.floor else -1
    known = [0, 0, 0]
    for number, _, *sizes in row.checkpoints or ():
        told = number <= floor or Place(number, row.request_index, row.choice_index) <= since.place
        if not told:
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
