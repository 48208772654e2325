"""Which jobs a list holds: the filter of the API, the command line and the web page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, and_, or_, select, true
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from storage.dialect import position_of
from storage.models import JobLabel, JobRow, JobText
from storage.pausing import shown_status
from storage.statuses import JobStatus

_FEW_JOBS: Final = 500


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Conditions that a listed job meets, all of them. Unset: any job, except interactive requests."""

    owner: str | None = None  # API key id
    interactive: bool = False  # include interactive requests, which are jobs too
    batches_only: bool = False
    id_prefix: str = ""
    statuses: tuple[str, ...] = ()  # any of these; `in_progress` does not include paused jobs
    labels: tuple[tuple[str, str | None], ...] = ()  # (key, value): all of these; value None: any value
    name: str | None = None  # the whole name
    model: str | None = None
    search: str = ""  # in the name or a label, in any case of its letters, or at the start of the id
    verification_of: str | None = None  # verifications of this job; None: jobs that are none

    def conditions(self, session: Session) -> Iterator[ColumnElement[bool]]:
        """Yield the conditions on a row of `jobs`."""
        if self.owner is not None:
            yield JobRow.api_key_id == self.owner
        if self.batches_only:
            yield JobRow.input_file_id.is_not(None)
        if self.id_prefix:
            yield JobRow.id.startswith(self.id_prefix, autoescape=True)
        if self.statuses:
            yield self._has_status()
        for key, value in self.labels:
            label = aliased(JobLabel)
            yield _is_among(session, label.job_id, label.key == key, true() if value is None else label.value == value)
        if self.name is not None:
            yield JobRow.name == self.name
        if self.model is not None:
            yield JobRow.model == self.model
        if self.search:
            found = position_of(session, JobText.text, self.search.casefold()) > 0
            named = _is_among(session, JobText.job_id, found)
            yield or_(named, JobRow.id.startswith(self.search, autoescape=True))
        if not self.interactive:
            yield JobRow.priority == 0
        yield JobRow.verification_of == self.verification_of  # None: IS NULL

    def _has_status(self) -> ColumnElement[bool]:
        paused = JobStatus.PAUSED in self.statuses
        stored = {JobStatus.IN_PROGRESS if status == JobStatus.PAUSED else status for status in self.statuses}
        if paused == (JobStatus.IN_PROGRESS in self.statuses):
            return JobRow.status.in_(sorted(stored))
        return and_(JobRow.status.in_(sorted(stored)), shown_status(JobRow).in_(self.statuses))


def _is_among(
    session: Session, job_id: InstrumentedAttribute[str], *conditions: ColumnElement[bool]
) -> ColumnElement[bool]:
    """Return the condition that a job has a row of another table that meets the conditions.

    If few rows do, their jobs are named, and read by their ids. If many do, the list is read in its order, and soon has
    enough of them. Neither way is fast for both.
    """
    ids = session.scalars(select(job_id).where(*conditions).limit(_FEW_JOBS + 1)).all()
    if len(ids) <= _FEW_JOBS:
        return JobRow.id.in_(ids)
    return select(job_id).where(job_id == JobRow.id, *conditions).correlate(JobRow).exists()
