"""From the story of a job to server-sent events, and from the id of an event back to the place in the story.

An id is what EventSource and our clients send back as `Last-Event-ID`. It holds all that is to be known of its reader,
so any shim goes on from it. To readers it is opaque.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jobs.json_lines import json_line
from jobs.messages import JobStatus, PartialEvent, Piece
from storage.event_log import Cursor, LogEvent, Page, Position

# 12: everything up to commit 12. 12-15: and the checkpoints of what was being written at commit 15; 12-15.14.3.0.1: and
# what ended up to this place. ~cancelling: the reader knows this status; ~ alone: none yet; else: in progress.
_ID = re.compile(
    r"(?P<base>-1|\d{1,18})"
    r"(?:-(?P<floor>\d{1,18})(?:\.(?P<number>\d{1,18})\.(?P<request>\d{1,9})\.(?P<choice>\d{1,9})\.(?P<part>\d))?)?"
    r"(?P<status>~[a-z_]*)?",
    re.ASCII,
)


def write_id(cursor: Cursor) -> str:
    """Return the id of the event that brings a reader to this cursor."""
    text = str(cursor.base)
    if cursor.floor >= 0:
        text += f"-{cursor.floor}"
    place = cursor.position
    if place.number >= 0:
        text += f".{place.number}.{place.request_index}.{place.choice_index}.{place.part}"
    if cursor.status != JobStatus.IN_PROGRESS:
        text += f"~{cursor.status or ''}"
    return text


def read_id(text: str | None) -> Cursor:
    """Return the cursor of an id; a new reader's for one that we did not write."""
    match = _ID.fullmatch(text or "")
    if match is None:
        return Cursor()
    place = Position(-1)
    if match["number"] is not None:
        place = Position(*(int(match[part]) for part in ("number", "request", "choice", "part")))
    status = JobStatus.IN_PROGRESS if match["status"] is None else match["status"][1:]
    return Cursor(int(match["base"]), int(match["floor"] or -1), place, status or None)


def server_sent(event: PartialEvent, event_id: str | None = None) -> bytes:
    """Return an event on the wire. Its data is one line, whatever the text holds."""
    name = "" if event_id is None else f"id: {event_id}\n"
    return f"{name}event: {event.type}\ndata: {json_line(event)}\n\n".encode()


def tell(job_id: str, page: Page, since: Cursor) -> tuple[bytes, Cursor]:
    """Return the events of a page for a reader with this cursor, and the cursor of a reader that was told them."""
    return b"".join(_events(job_id, page, since)), page.cursor


def _events(job_id: str, page: Page, since: Cursor) -> Iterator[bytes]:
    for event in page.events:
        event_id = None if event.cursor is None else write_id(event.cursor)
        yield server_sent(_event(job_id, event), event_id)
    if page.cursor.status != since.status:
        status = JobStatus(page.status)
        yield server_sent(PartialEvent(job_id=job_id, type="job", status=status), write_id(page.cursor))


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
        **fields,
    )
