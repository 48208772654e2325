"""Encode a job's event log as server-sent events, and cursors as `Last-Event-ID`.

The id holds everything the server must know about a reader, so any API server can continue its stream. It is opaque to
clients.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jobs.json_lines import json_line
from jobs.messages import AnswerFormat, JobStatus, PartialEvent, Piece
from storage.event_log import Cursor, LogEvent, Page, Position

# Format: base[-until[.number.request.choice.part]][~status], for example
#   12             everything up to commit 12
#   12-15          and the open checkpoints as of commit 15
#   12-15.14.3.0.1 and the finished requests up to this position
# Status: ~cancelling = the reader knows this status, ~ = it knows none, no ~ = in progress.
_ID = re.compile(
    r"(?P<base>-1|\d{1,18})"
    r"(?:-(?P<until>\d{1,18})(?:\.(?P<number>\d{1,18})\.(?P<request>\d{1,9})\.(?P<choice>\d{1,9})\.(?P<part>\d))?)?"
    r"(?P<status>~[a-z_]*)?",
    re.ASCII,
)


_DATA = b"data: "


def encode_cursor(cursor: Cursor) -> str:
    """Return the cursor as an event id."""
    text = str(cursor.base)
    if cursor.until >= 0:
        text += f"-{cursor.until}"
    position = cursor.position
    if position.number >= 0:
        text += f".{position.number}.{position.request_index}.{position.choice_index}.{position.part}"
    if cursor.status != JobStatus.IN_PROGRESS:
        text += f"~{cursor.status or ''}"
    return text


def decode_cursor(text: str | None) -> Cursor:
    """Return the cursor of an event id; a new reader's cursor if the id is missing or not ours."""
    match = _ID.fullmatch(text or "")
    if match is None:
        return Cursor()
    position = Position(-1)
    if match["number"] is not None:
        position = Position(*(int(match[part]) for part in ("number", "request", "choice", "part")))
    status = JobStatus.IN_PROGRESS if match["status"] is None else match["status"][1:]
    return Cursor(int(match["base"]), int(match["until"] or -1), position, status or None)


def encode_event(event: PartialEvent, event_id: str | None = None) -> bytes:
    """Return an event in the format of server-sent events, with its data on one line."""
    name = "" if event_id is None else f"id: {event_id}\n"
    return f"{name}event: {event.type}\ndata: {json_line(event)}\n\n".encode()


def decode_events(sent: bytes) -> Iterator[PartialEvent]:
    """Yield the events of what `EventHub.follow` yields: the inverse of `encode_event`, for readers in this process."""
    for line in sent.splitlines():
        if line.startswith(_DATA):
            yield PartialEvent.model_validate_json(line.removeprefix(_DATA))


def encode_page(job_id: str, page: Page, since: Cursor) -> tuple[bytes, Cursor]:
    """Return the encoded events of a page for a reader with this cursor, and the reader's cursor after them."""
    return b"".join(_events(job_id, page, since)), page.cursor


def _events(job_id: str, page: Page, since: Cursor) -> Iterator[bytes]:
    for event in page.events:
        event_id = None if event.cursor is None else encode_cursor(event.cursor)
        yield encode_event(_event(job_id, event), event_id)
    if page.cursor.status != since.status:
        status = JobStatus(page.status)
        yield encode_event(PartialEvent(job_id=job_id, type="job", status=status), encode_cursor(page.cursor))


def _event(job_id: str, event: LogEvent) -> PartialEvent:
    fields: dict[str, Any] = {}
    if event.kind == "tokens":
        pieces = tuple(Piece.model_validate({"text": text, "source": source}) for text, source in event.pieces)
        fields = {"text": event.text, "pieces": pieces, "tokens": event.tokens, "accepted": event.accepted}
    return PartialEvent(
        job_id=job_id,
        request=event.custom_id,
        index=event.request_index,
        choice=event.choice_index,
        seq=max(event.seq, 0),
        type=event.kind,
        finish_reason=event.finish_reason,
        error=event.error,
        snapshot=event.from_start,
        answer_format=None if event.answer_format is None else AnswerFormat.model_validate(event.answer_format),
        **fields,
    )
