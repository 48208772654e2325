"""Prune `decode_steps`: delete the steps of jobs that ended long ago. Jobs, requests and outputs stay.

Each transaction deletes the steps of a few requests by primary key, so that workers are not blocked for long and no
extra index is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import delete, exists, select

from storage.dialect import database_now
from storage.models import JobRow, PackedSteps
from storage.session import Database

_JOBS_PER_PAGE = 100
_REQUESTS_PER_DELETE = 200


def prune_steps(database: Database, older_than_s: float) -> Iterator[int]:
    """Delete the steps of jobs that ended more than `older_than_s` ago; yield the number of each transaction."""
    after = ""
    while True:
        with database.read() as session:
            has_steps = exists().where(PackedSteps.job_id == JobRow.id)
            old = (JobRow.finished_at < database_now(session) - older_than_s, JobRow.id > after, has_steps)
            columns = select(JobRow.id, JobRow.requests_total)
            jobs = session.execute(columns.where(*old).order_by(JobRow.id).limit(_JOBS_PER_PAGE)).all()
        if not jobs:
            return
        for job_id, requests in jobs:
            for first in range(0, requests, _REQUESTS_PER_DELETE):
                among = PackedSteps.request_index.between(first, first + _REQUESTS_PER_DELETE - 1)
                with database.write() as session:
                    of_the_job = delete(PackedSteps).where(PackedSteps.job_id == job_id, among)
                    yield sum(session.scalars(of_the_job.returning(PackedSteps.steps)))
        after = jobs[-1].id
