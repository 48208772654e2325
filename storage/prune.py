"""Prune by age: delete prompts, outputs, steps and files of jobs that ended long ago. The jobs and their counts stay.

Each transaction touches the rows of a few hundred requests by primary key, so that workers are not blocked for long and
no extra index is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Double, delete, exists, func, literal, select, update
from sqlalchemy.orm import Session

from storage import files
from storage.dialect import database_now
from storage.erasure import REQUESTS_PER_DELETE
from storage.models import ApiKey, ChoiceOutput, DraftTree, JobRow, PackedSteps, Partial, Request
from storage.session import Database

_JOBS_PER_PAGE: Final = 500


class Kept(StrEnum):
    """What is kept for a time of its own."""

    PROMPTS = "prompts"  # bodies of requests, and what outputs return of their prompts
    OUTPUTS = "outputs"  # texts, tokens, checkpoints and draft trees
    STEPS = "steps"
    FILES = "files"


@dataclass(frozen=True, slots=True)
class Ages:
    """For how many seconds each is kept, after its job has ended; files: after they were created. None: for ever.

    `by_key`: keys with ages of their own keep theirs.
    """

    prompts_s: float | None = None
    outputs_s: float | None = None
    steps_s: float | None = None
    files_s: float | None = None
    by_key: bool = True


def prune(database: Database, ages: Ages) -> Iterator[tuple[Kept, int]]:
    """Delete what is older than its age; yield what each transaction deleted, and how much of it."""
    for kept, age_s in ((Kept.PROMPTS, ages.prompts_s), (Kept.OUTPUTS, ages.outputs_s), (Kept.STEPS, ages.steps_s)):
        if age_s is not None or ages.by_key:
            for deleted in _prune_requests(database, kept, age_s, by_key=ages.by_key):
                yield kept, deleted
    if ages.files_s is not None or ages.by_key:
        yield from ((Kept.FILES, deleted) for deleted in _prune_files(database, ages.files_s))


def prune_steps(database: Database, older_than_s: float) -> Iterator[int]:
    """Delete the steps of jobs that ended more than `older_than_s` ago; yield the number of each transaction."""
    return _prune_requests(database, Kept.STEPS, older_than_s, by_key=False)


def paced(pieces: Iterable[Any], sleep: Callable[[float], object] = time.sleep) -> Iterator[Any]:
    """Yield the results of transactions, with pauses as long as each, in which other transactions run."""
    began_at = time.monotonic()
    for piece in pieces:
        yield piece
        sleep(time.monotonic() - began_at)
        began_at = time.monotonic()


@dataclass(frozen=True, slots=True)
class _Slice:
    """Requests of some jobs that one transaction prunes: all of small jobs, or a range of a large one."""

    job_ids: tuple[str, ...]
    first: int = 0
    last: int = REQUESTS_PER_DELETE - 1
    ends: bool = True  # nothing of these jobs is left

    def of(self, model: type[Any]) -> tuple[ColumnElement[bool], ...]:
        """Return the conditions that a row belongs to the slice."""
        return model.job_id.in_(self.job_ids), model.request_index.between(self.first, self.last)


def _prune_requests(database: Database, kept: Kept, age_s: float | None, *, by_key: bool) -> Iterator[int]:
    after = ""
    while True:
        with database.read() as session:
            jobs = session.execute(
                select(JobRow.id, JobRow.requests_total)
                .where(*_is_old(session, kept, age_s, by_key=by_key), _HAS[kept], JobRow.erased_at.is_(None))
                .where(JobRow.id > after)
                .order_by(JobRow.id)
                .limit(_JOBS_PER_PAGE)
            ).all()
        for piece in _slices([(job.id, job.requests_total) for job in jobs]):
            with database.write() as session:
                deleted = _PRUNE[kept](session, piece)
            yield deleted
        if len(jobs) < _JOBS_PER_PAGE:
            return
        after = jobs[-1].id


def _is_old(session: Session, kept: Kept, age_s: float | None, *, by_key: bool) -> Sequence[ColumnElement[bool]]:
    age: ColumnElement[Any] = literal(age_s, Double())
    if by_key:
        own = select(getattr(ApiKey, f"{kept}_kept_s")).where(ApiKey.id == JobRow.api_key_id).scalar_subquery()
        age = func.coalesce(own, age)
    return (JobRow.finished_at < database_now(session) - age,)  # NULL, for ever: never true


def _slices(jobs: Iterable[tuple[str, int]]) -> Iterator[_Slice]:
    small: list[str] = []
    requests = 0
    for job_id, total in jobs:
        if total > REQUESTS_PER_DELETE:
            for first in range(0, total, REQUESTS_PER_DELETE):
                last = first + REQUESTS_PER_DELETE - 1
                yield _Slice((job_id,), first, last, ends=last >= total - 1)
            continue
        if small and requests + total > REQUESTS_PER_DELETE:
            yield _Slice(tuple(small))
            small, requests = [], 0
        small.append(job_id)
        requests += max(1, total)
    if small:
        yield _Slice(tuple(small))


def _prune_prompts(session: Session, piece: _Slice) -> int:
    echoed = update(ChoiceOutput).where(*piece.of(ChoiceOutput), ChoiceOutput.prompt.is_not(None))
    session.execute(echoed.values(prompt=None))
    given = update(Request).where(*piece.of(Request), Request.body.is_not(None))
    pruned = session.scalars(given.values(body=None, identity=None).returning(Request.request_index)).all()
    _mark(session, piece, "prompts_deleted_at")
    return len(pruned)


def _prune_outputs(session: Session, piece: _Slice) -> int:
    for model in (Partial, DraftTree):
        session.execute(delete(model).where(*piece.of(model)))
    session.execute(update(Request).where(*piece.of(Request), Request.identity.is_not(None)).values(identity=None))
    gone = delete(ChoiceOutput).where(*piece.of(ChoiceOutput)).returning(ChoiceOutput.choice_index)
    pruned = session.scalars(gone).all()
    _mark(session, piece, "outputs_deleted_at")
    return len(pruned)


def _prune_steps(session: Session, piece: _Slice) -> int:
    return sum(session.scalars(delete(PackedSteps).where(*piece.of(PackedSteps)).returning(PackedSteps.steps)))


def _mark(session: Session, piece: _Slice, column: str) -> None:
    if piece.ends:
        marked = update(JobRow).where(JobRow.id.in_(piece.job_ids)).values({column: database_now(session)})
        session.execute(marked)


def _prune_files(database: Database, age_s: float | None) -> Iterator[int]:
    with database.write() as session:
        hidden = files.hide_old_files(session, age_s)
    yield hidden
    cleared = 1
    while cleared:
        with database.write() as session:
            cleared = files.clear_files(session)
        yield 0


_PRUNE: Final[dict[Kept, Callable[[Session, _Slice], int]]] = {
    Kept.PROMPTS: _prune_prompts,
    Kept.OUTPUTS: _prune_outputs,
    Kept.STEPS: _prune_steps,
}
_HAS: Final[dict[Kept, ColumnElement[bool]]] = {  # what is not pruned yet
    Kept.PROMPTS: JobRow.prompts_deleted_at.is_(None),
    Kept.OUTPUTS: JobRow.outputs_deleted_at.is_(None),
    Kept.STEPS: exists().where(PackedSteps.job_id == JobRow.id),
}
