"""From the story of a job to server-sent events, and from the id of an event back to the place in the story.

storage.story -> [telling] -> broadcast.  An id is what EventSource and our clients send back as `Last-Event-ID`. It
holds all that is to be known of its reader, so any shim goes on from it. To readers it is opaque.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jobs.messages import JobStatus, PartialEvent, Piece
from storage.story import Cursor, Page, Passage, Place

# 12 or 12.3.0.1: everything up to commit 12, or up to a place in it. @17: checkpoints up to commit 17, too.
# ~cancelling: the reader knows this status; without it, that the job is in progress; ~ alone: no status yet.
_ID = re.compile(
    r"(?P<number>-1|\d{1,18})(?:\.(?P<request>\d{1,10})\.(?P<choice>\d{1,10})\.(?P<part>\d))?"
    r"(?:@(?P<floor>\d{1,18}))?(?P<status>~[a-z_]*)?",
    re.ASCII,
)


def write_id(cursor: Cursor) -> str:
    """Return the id of the event that brings a reader to this cursor."""
    place = cursor.place
    text = str(place.number)
    if not place.is_behind_a_commit:
        text += f".{place.request_index}.{place.choice_index}.{place.part}"
    if cursor.floor >= place.number and not place.is_behind_a_commit:
        text += f"@{cursor.floor}"
    if cursor.status != JobStatus.IN_PROGRESS:
        text += f"~{cursor.status or ''}"
    return text


def read_id(text: str | None) -> Cursor:
    """Return the cursor of an id; a new reader's for one that we did not write."""
    match = _ID.fullmatch(text or "")
    if match is None:
        return Cursor()
    number = int(match["number"])
    place = Place.behind(number)
    if match["request"] is not None:
        place = Place(number, *(int(match[part]) for part in ("request", "choice", "part")))
    status = JobStatus.IN_PROGRESS if match["status"] is None else match["status"][1:]
    return Cursor(place, int(match["floor"] or -1), status or None)


def server_sent(event: PartialEvent, event_id: str | None = None) -> bytes:
    """Return an event on the wire. Its data is one line, whatever the text holds."""
    name = "" if event_id is None else f"id: {event_id}\n"
    return f"{name}event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n".encode()


def tell(job_id: str, page: Page, since: Cursor) -> tuple[bytes, Cursor]:
    """Return the events of a page for a reader with this cursor, and the cursor of a reader that was told them."""
    after = page.cursor if page.complete else Cursor(page.cursor.place, page.cursor.floor, since.status)
    return b"".join(_events(job_id, page, since, after)), after


def _events(job_id: str, page: Page, since: Cursor, after: Cursor) -> Iterator[bytes]:
    for number, passage in enumerate(page.passages, start=1):
        cursor = passage.cursor
        if cursor is None and number == len(page.passages):
            cursor = after  # only now nothing of the page is missing
        yield server_sent(_event(job_id, passage), None if cursor is None else write_id(cursor))
    if after.status != since.status:
        yield server_sent(PartialEvent(job_id=job_id, type="job", status=JobStatus(page.status)), write_id(after))


def _event(job_id: str, passage: Passage) -> PartialEvent:
    fields: dict[str, Any] = {}
    if passage.kind == "tokens":
        pieces = tuple(Piece.model_validate({"text": text, "source": source}) for text, source in passage.pieces)
        fields = {"text": passage.text, "pieces": pieces, "tokens": passage.tokens, "accepted": passage.accepted}
    return PartialEvent(
        job_id=job_id,
        request=passage.custom_id,
        index=passage.request_index,
        choice=passage.choice_index,
        seq=max(passage.seq, 0),
        type=passage.kind,
        finish_reason=passage.finish_reason,
        error=passage.error,
        snapshot=passage.from_start,
        **fields,
    )
