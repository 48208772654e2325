"""Checkpoints of open choices: each flush writes one for each choice, and the last one of a choice takes them back.

They are most of what a flush writes: their JSON is encoded here, and one statement writes all of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import Text, cast, delete
from sqlalchemy.orm import Session

from storage.dialect import is_one_of, storable
from storage.models import Partial
from storage.progress.json_text import from_json, to_json
from storage.progress.new_rows import insert_new
from storage.records import Checkpoint, RequestProgress
from storage.steps.columns import StepColumns, stored_steps

ChoiceKey = tuple[str, int, int]  # (job_id, request_index, choice_index)


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint that is about to become a part of an output."""

    seq: int
    num_chars: int
    num_tokens: int
    accepted_tokens: int
    pieces: Sequence[Sequence[str]]  # (text, "draft" | "target")
    steps: StepColumns
    logprobs: list[Any] | None
    worker_id: str
    event_number: int
    numerics: str | None


def write_checkpoints(
    session: Session,
    worker_id: str,
    progress: Iterable[RequestProgress],
    now: float,
    numbers: Mapping[str, int],
    numerics: str | None = None,
) -> Counter[str]:
    """Write the checkpoints that are not there yet; return how many tokens the new ones have, by job.

    `numbers` are the event numbers of this flush, by job; `numerics` is the fingerprint of the worker.
    """
    rows, tokens = {}, {}
    for entry in progress:
        common = {
            "worker_id": worker_id,
            "committed_at": now,
            "event_number": numbers[entry.lease.job_id],
            "numerics": numerics,
        }
        for checkpoint in entry.checkpoints:
            key = (*entry.lease.key, checkpoint.choice_index, checkpoint.seq)
            rows[key], tokens[key] = _columns(checkpoint) | common, len(checkpoint.token_ids)
    written: Counter[str] = Counter()
    for key in insert_new(session, Partial, rows):
        written[key[0]] += tokens[key]
    return written


def _columns(checkpoint: Checkpoint) -> dict[str, Any]:
    text, pieces = storable(checkpoint.text), checkpoint.pieces
    if text != checkpoint.text:
        pieces = tuple((storable(part), source) for part, source in pieces)
    return {
        "token_ids": to_json(checkpoint.token_ids),
        "accepted": to_json(checkpoint.accepted),
        "text": text,
        "pieces": to_json(pieces),
        "steps": "[]",
        "step_columns": to_json(checkpoint.steps.to_json()),
        "logprobs": None if checkpoint.logprobs is None else to_json(checkpoint.logprobs),
    }


def take_checkpoints(session: Session, keys: Collection[ChoiceKey]) -> dict[ChoiceKey, list[StoredCheckpoint]]:
    """Delete the checkpoints of these choices and return them by choice, in order."""
    choices: defaultdict[ChoiceKey, list[StoredCheckpoint]] = defaultdict(list)
    taken = session.connection().execute(delete(Partial).where(is_one_of(_KEY, keys)).returning(*_KEY, *_CONTENT))
    for job_id, request_index, choice_index, *content in sorted(taken, key=itemgetter(slice(4))):
        choices[job_id, request_index, choice_index].append(_stored(*content))
    return choices


_KEY: Final = (Partial.job_id, Partial.request_index, Partial.choice_index)
_CONTENT: Final = (
    Partial.seq,
    Partial.worker_id,
    Partial.event_number,
    Partial.numerics,
    Partial.text,
    *(
        cast(column, Text)  # `from_json` reads it
        for column in (
            Partial.token_ids,
            Partial.accepted,
            Partial.pieces,
            Partial.steps,
            Partial.step_columns,
            Partial.logprobs,
        )
    ),
)


def _stored(
    seq: int,
    worker_id: str,
    event_number: int,
    numerics: str | None,
    text: str,
    token_ids: str,
    accepted: str,
    pieces: str,
    rows: str,
    columns: str | None,
    logprobs: str | None,
) -> StoredCheckpoint:
    steps = stored_steps(None if columns is None else from_json(columns), () if columns else from_json(rows))
    return StoredCheckpoint(
        seq=seq,
        worker_id=worker_id,
        event_number=event_number,
        numerics=numerics,
        num_chars=len(text),
        num_tokens=len(from_json(token_ids)),
        accepted_tokens=sum(from_json(accepted)),
        pieces=from_json(pieces),
        steps=steps,
        logprobs=None if logprobs is None else from_json(logprobs),
    )
