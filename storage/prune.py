"""Pruning: decoding steps of jobs that ended long ago are deleted, so that the table does not grow for ever.

Jobs, requests and outputs stay. The steps of a few hundred requests are a transaction, along the primary key: no index
of its own is needed, and workers and readers go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import delete, exists, select

from storage.dialect import database_now
from storage.models import DecodeStep, Job
from storage.session import Database

_JOBS_AT_ONCE = 100
_REQUESTS_AT_ONCE = 200


def prune_steps(database: Database, older_than_s: float) -> Iterator[int]:
    """Delete the steps of jobs that ended longer ago, and yield the rows of every transaction."""
    after = ""
    while True:
        with database.read() as session:
            has_steps = exists().where(DecodeStep.job_id == Job.id)
            old = (Job.finished_at < database_now(session) - older_than_s, Job.id > after, has_steps)
            columns = select(Job.id, Job.requests_total)
            jobs = session.execute(columns.where(*old).order_by(Job.id).limit(_JOBS_AT_ONCE)).all()
        if not jobs:
            return
        for job_id, requests in jobs:
            for first in range(0, requests, _REQUESTS_AT_ONCE):
                few = DecodeStep.request_index.between(first, first + _REQUESTS_AT_ONCE - 1)
                with database.write() as session:
                    of_the_job = delete(DecodeStep).where(DecodeStep.job_id == job_id, few)
                    yield session.connection().execute(of_the_job).rowcount
        after = jobs[-1].id
