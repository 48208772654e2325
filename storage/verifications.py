"""Verifications: a sample of a job's outputs is computed again, as a job of its own, and compared token for token.

The verification's requests are copies; their custom ids are the indexes of the requests that they copy. Workers decode
them without drafts. They are no part of the verified job: not of its counts, outputs or statistics.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, and_, exists, select
from sqlalchemy.orm import Session

from storage.models import ChoiceOutput, JobRow, NumericsRow, Request
from storage.numerics import fingerprints_of
from storage.records import RequestPlan

Verdict = Literal["equal", "different", "not_comparable"]

_PAGE: Final = 200
_DRAWS: Final = 500  # random indexes that are looked up together


@dataclass(frozen=True, slots=True)
class SampledOutput:
    """A request with an output, to be computed again."""

    request_index: int
    body: Mapping[str, Any]
    plan: RequestPlan  # by which it was decoded


@dataclass(frozen=True, slots=True)
class ComputedText:
    """One choice of a request, as it was computed."""

    text: str
    token_ids: list[int]
    finish_reason: str
    numerics: str | None


@dataclass(frozen=True, slots=True)
class VerifiedRequest:
    """A sampled request: what it had, what the second computation has, and how they compare."""

    request_index: int
    custom_id: str
    verdict: Verdict
    reason: str | None  # why they can't be compared, or where they differ
    first: tuple[ComputedText, ...]
    second: tuple[ComputedText, ...]


def completed_requests(session: Session, job_id: str) -> int:
    """Return how many requests of a job have an output."""
    return session.scalar(select(JobRow.requests_completed).where(JobRow.id == job_id)) or 0


def draw_sample(session: Session, job_id: str, count: int, seed: int) -> Iterator[SampledOutput]:
    """Yield up to `count` completed requests of a job that still have prompt and output, drawn by `seed`."""
    total = session.scalar(select(JobRow.requests_total).where(JobRow.id == job_id)) or 0
    drawn = 0
    for indexes in _shuffled(total, seed):
        query = select(Request.request_index, Request.body, Request.answer_format, Request.sampling_defaults)
        of_job = (Request.job_id == job_id, Request.request_index.in_(indexes), Request.status == "completed")
        kept = (Request.body.is_not(None), _has_output())  # neither has been deleted because of its age
        rows = {row.request_index: row for row in session.execute(query.where(*of_job, *kept))}
        for index in indexes:
            if index in rows and drawn < count:
                drawn += 1
                row = rows[index]
                yield SampledOutput(index, row.body, RequestPlan(row.answer_format, row.sampling_defaults))
        if drawn == count:
            return


def _has_output() -> ColumnElement[bool]:
    same = and_(ChoiceOutput.job_id == Request.job_id, ChoiceOutput.request_index == Request.request_index)
    return exists().where(same)


def _shuffled(total: int, seed: int) -> Iterator[list[int]]:
    """Yield all indexes below `total` in random order, in groups; the memory grows with those that were yielded."""
    generator, moved = random.Random(seed), dict[int, int]()
    group: list[int] = []
    for place in range(total):  # Fisher and Yates, with a dict of the places that differ from their index
        other = generator.randrange(place, total)
        group.append(moved.get(other, other))
        moved[other] = moved.pop(place, place)
        if len(group) == _DRAWS:
            yield group
            group = []
    if group:
        yield group


def compared(session: Session, verification_id: str, job_id: str) -> Iterator[VerifiedRequest]:
    """Yield the requests of an ended verification of a job, in the order of the job."""
    own = select(Request.request_index, Request.custom_id, Request.status, Request.error_code).where(
        Request.job_id == verification_id
    )
    copies = sorted(session.execute(own), key=lambda row: int(row.custom_id))
    unsure = _batch_dependent(session)
    for start in range(0, len(copies), _PAGE):
        page = copies[start : start + _PAGE]
        second = _texts(session, verification_id, [row.request_index for row in page])
        indexes = [int(row.custom_id) for row in page]
        first = _texts(session, job_id, indexes)
        named = select(Request.request_index, Request.custom_id).where(
            Request.job_id == job_id, Request.request_index.in_(indexes)
        )
        names = {row.request_index: row.custom_id for row in session.execute(named)}
        for row, index in zip(page, indexes, strict=True):
            both = (tuple(first[index]), tuple(second[row.request_index]))
            verdict, reason = _verdict(*both, unsure)
            if row.status != "completed":
                verdict, reason = (
                    "not_comparable",
                    f"the second computation is {row.status}: {row.error_code or 'error'}",
                )
            yield VerifiedRequest(index, names.get(index, ""), verdict, reason, *both)


def _texts(session: Session, job_id: str, indexes: Collection[int]) -> defaultdict[int, list[ComputedText]]:
    query = select(
        ChoiceOutput.request_index,
        ChoiceOutput.text,
        ChoiceOutput.token_ids,
        ChoiceOutput.finish_reason,
        ChoiceOutput.numerics,
    ).where(ChoiceOutput.job_id == job_id, ChoiceOutput.request_index.in_(indexes))
    found: defaultdict[int, list[ComputedText]] = defaultdict(list)
    for index, *columns in session.execute(query.order_by(ChoiceOutput.request_index, ChoiceOutput.choice_index)):
        found[index].append(ComputedText(*columns))
    return found


def _batch_dependent(session: Session) -> frozenset[str]:
    """Return the fingerprints under which the bits of a text may depend on its batch."""
    rows = session.execute(select(NumericsRow.fingerprint, NumericsRow.parts))
    return frozenset(row.fingerprint for row in rows if row.parts.get("depends_on_batch"))


def _verdict(
    first: Sequence[ComputedText], second: Sequence[ComputedText], unsure: Collection[str]
) -> tuple[Verdict, str | None]:
    """Compare two computations. Equal texts are equal under any numerics; others differ only under the same."""
    if not first:
        return "not_comparable", "the job has no output of this request any more"
    if len(first) != len(second):
        return "different", f"{len(second)} choices instead of {len(first)}"
    for choice, (one, other) in enumerate(zip(first, second, strict=True)):
        if (one.token_ids, one.text, one.finish_reason) != (other.token_ids, other.text, other.finish_reason):
            return _unequal(choice, one, other, unsure)
    return "equal", None


def _unequal(
    choice: int, one: ComputedText, other: ComputedText, unsure: Collection[str]
) -> tuple[Verdict, str | None]:
    if one.numerics is None or other.numerics is None or one.numerics != other.numerics:
        return "not_comparable", f"other numerics: {one.numerics or 'unknown'}, then {other.numerics or 'unknown'}"
    if len(fingerprints_of(one.numerics)) > 1:
        return "not_comparable", f"computed under several numerics: {one.numerics}"
    if one.numerics in unsure:
        return "not_comparable", f"under {one.numerics} the bits of a text may depend on its batch"
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    place = next((place for place, (left, right) in enumerate(pairs) if left != right), None)
    if place is not None:
        return "different", f"choice {choice} differs from token {place} on"
    if one.token_ids == other.token_ids:
        return "different", f"choice {choice} has the same tokens and another text or end"
    shorter = min(one, other, key=lambda text: len(text.token_ids))
    if shorter.finish_reason == "length":
        return "not_comparable", f"choice {choice} is cut after {len(shorter.token_ids)} tokens: another context length"
    return "different", f"choice {choice} ends after {len(other.token_ids)} tokens instead of {len(one.token_ids)}"
