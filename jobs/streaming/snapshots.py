"""The story of a job as SQL has it, told in events: for readers that come late or have missed something.

Knows no Redis and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.messages import JobStatus, PartialEvent, Piece
from storage import queries
from storage.queries import ChoiceSnapshot
from storage.session import Database


def read_events(database: Database, job_id: str) -> list[PartialEvent]:
    """Return all text of a job so far and its status, the status last; nothing if there is no such job.

    The status is read first: once it is final, the text read after it is whole.
    """
    with database.read() as session:
        job = queries.job(session, job_id)
        if job is None:
            return []
        choices = queries.snapshot(session, job_id)
    events = [event for choice in choices for event in _choice_events(job_id, choice)]
    return [*events, PartialEvent(job_id=job_id, type="job", status=JobStatus(job.status))]


def _choice_events(job_id: str, choice: ChoiceSnapshot) -> Iterator[PartialEvent]:
    """Yield the text of a choice as one event, and its end as another, numbered as they were published."""
    finished = choice.finish_reason is not None
    text_seq = choice.last_seq - 1 if finished else choice.last_seq
    if choice.tokens:
        yield _event(job_id, choice, text_seq, type="tokens", snapshot=True, **_text(choice))
    if finished:
        yield _event(job_id, choice, choice.last_seq, type="finished", finish_reason=choice.finish_reason)
    elif choice.error is not None:
        yield _event(job_id, choice, choice.last_seq + 1, type="failed", error=choice.error)


def _text(choice: ChoiceSnapshot) -> dict[str, Any]:
    pieces = tuple(Piece.model_validate({"text": text, "source": source}) for text, source in choice.pieces)
    return {"text": choice.text, "pieces": pieces, "tokens": choice.tokens, "accepted": choice.accepted}


def _event(job_id: str, choice: ChoiceSnapshot, seq: int, **fields: Any) -> PartialEvent:
    identity = {"job_id": job_id, "request": choice.custom_id, "index": choice.request_index}
    return PartialEvent(**identity, choice=choice.choice_index, seq=max(seq, 0), **fields)
