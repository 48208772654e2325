from __future__ import annotations

from sqlalchemy import func, select, text

from storage.models import ChoiceOutput, DecodeStep
from storage.prune import prune_steps
from storage.session import Database
from tests.unit.storage.acts import claim, flush, record, whole


def test_steps_of_jobs_that_ended_long_ago_are_deleted_and_nothing_else(database: Database) -> None:
    for job_id in ("old", "young", "running"):
        record(database, job_id, 2)
    for claimed in claim(database, limit=6):
        if claimed.lease.key != ("running", 1):
            flush(database, "w1", whole(claimed.lease, 1, 2))
    with database.write() as session:
        session.execute(text("UPDATE jobs SET finished_at = finished_at - 7200 WHERE id = 'old'"))

    assert sum(prune_steps(database, 3600.0)) == 4
    assert sum(prune_steps(database, 3600.0)) == 0

    with database.read() as session:
        left = dict(session.execute(select(DecodeStep.job_id, func.count()).group_by(DecodeStep.job_id)).all())
        assert left == {"young": 4, "running": 2}
        assert session.scalar(select(func.count()).select_from(ChoiceOutput)) == 5
