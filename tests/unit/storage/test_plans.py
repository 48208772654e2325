"""Query plans on SQLite: no frequent query may read all requests of a large job, finished ones included."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event

from storage import event_log, leases, queries, writes
from storage.cached_answers import CacheScope, Repeats, copy_answers
from storage.event_log import Cursor
from storage.records import RequestProgress
from storage.session import Database
from tests.factories import a_request
from tests.unit.storage.acts import cancel, claim, flush, record, release, tokens_of, view, whole


def plans_of(database: Database, act: Callable[[], object]) -> dict[str, list[str]]:
    """Return SQLite's query plan of every statement that an act executes."""
    executed: list[tuple[str, Any]] = []

    def note(_c: object, _cursor: object, statement: str, parameters: Any, _context: object, many: bool) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            executed.append((statement, parameters[0] if many else parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    act()
    event.remove(database.engine, "before_cursor_execute", note)
    with database.read() as session:
        explain = session.connection().exec_driver_sql
        return {sql: [row[3] for row in explain(f"EXPLAIN QUERY PLAN {sql}", values)] for sql, values in executed}


def work(database: Database) -> None:
    """The frequent writes of workers, on two jobs."""
    repeats = Repeats(CacheScope("scope", "fp_1"))
    claims = claim(database, limit=6, repeats=repeats)
    flush(database, "w1", *(RequestProgress(c.lease, (tokens_of(1, 1, 2),)) for c in claims))
    flush(database, "w1", *(whole(c.lease, 1, 3) for c in claims[:3]), held=[c.lease for c in claims[3:]])
    release(database, "w1", *(c.lease for c in claims[3:]))
    claim(database, "w2", lease_s=-1)
    claim(database, "w1", repeats=repeats)
    with database.write() as session:
        copy_answers(session, {"same"}, repeats.scope)
        leases.jobs_to_notify(session, -1.0)
        writes.end_jobs(session)
        writes.expire_requests(session)


def look(database: Database) -> None:
    """The frequent reads."""
    view(database)
    with database.read() as session:
        queries.jobs(session, 5, after="job-1")
        event_log.read(session, "job-1", Cursor(), 100)
        list(queries.outputs(session, "job-1"))
        queries.job_stats(session, "job-1")


@pytest.fixture
def two_jobs(sqlite: Database) -> Database:
    record(sqlite, "job-1", 6)
    record(sqlite, "job-2", [a_request(f"equal-{number}", identity="same") for number in range(6)])
    return sqlite


def test_workers_read_only_requests_they_name_or_that_are_unfinished(two_jobs: Database) -> None:
    plans = plans_of(two_jobs, lambda: work(two_jobs))

    steps = {(step, sql) for sql, plan in plans.items() for step in plan if re.search(r"\brequests\b", step)}
    assert len(steps) > 10
    few = re.compile(
        r"job_id=\? AND (request_index|status)=\?|USING INDEX ix_requests_(suspect_group|expires_at|identity_status)"
    )
    assert [found for found in steps if not few.search(found[0])] == []


@pytest.mark.parametrize("act", [work, look, cancel])
def test_no_table_that_grows_is_read_whole(two_jobs: Database, act: Callable[[Database], object]) -> None:
    plans = plans_of(two_jobs, lambda: act(two_jobs))

    growing = re.compile(r"SCAN (requests|outputs|partials|packed_steps)")
    assert plans
    assert {sql: plan for sql, plan in plans.items() if any(growing.match(step) for step in plan)} == {}


def test_a_job_is_read_from_its_row_and_its_first_request_however_many_it_has(two_jobs: Database) -> None:
    (plan,) = plans_of(two_jobs, lambda: view(two_jobs)).values()
    assert [re.sub(r" USING INDEX \S+", "", step) for step in plan] == [
        "SEARCH jobs (id=?)",
        "CORRELATED SCALAR SUBQUERY 1",
        "SEARCH requests (job_id=? AND request_index=?)",
    ]
