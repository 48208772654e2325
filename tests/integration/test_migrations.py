from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from storage import queries, schema, speedup_checks, writes
from storage.job_filter import JobFilter
from storage.models import Base
from storage.records import RequestProgress, SpeedupCheckResult
from storage.session import Database, make_engine, write_connection
from storage.steps.conversion import unpacked_steps
from storage.steps.view import FIRST_COLUMNS
from storage.views import VIEWS
from tests.databases import drop_schema
from tests.factories import a_checkpoint, a_finished_choice, a_step, some_steps
from tests.unit.storage.acts import claim, claim_one, flush, record, whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "basic.sqlite3"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest, path: Path) -> Iterator[str]:
    """The URL of a database without a schema, on either server."""
    if request.param == "sqlite":
        yield f"sqlite:///{path}"
        return
    url: str = request.getfixturevalue("postgresql_url")
    drop_schema(url)
    yield url
    drop_schema(url)


def tables_and_views(url: str) -> set[str]:
    engine = make_engine(url)
    found = inspect(engine)
    names = {*found.get_table_names(), *found.get_view_names()} - {"alembic_version"}
    engine.dispose()
    return names


def definitions(path: Path) -> dict[tuple[str, str], list[str]]:
    """The definitions of all objects of a SQLite database, without white space and the order within a table."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {(kind, name): parts(sql) for kind, name, sql in rows if name != "alembic_version"}


def parts(sql: str) -> list[str]:
    """The columns and constraints of a definition in alphabetical order, since a column that is added later comes last.

    Without quotes: SQLite quotes the name of a recreated table.
    """
    depth, found = 0, [""]
    for letter in " ".join(sql.replace('"', "").split()):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 1:
            found.append("")
        elif depth or letter != ")":
            found[-1] += letter
    head, found[0] = found[0].split("(", 1) if "(" in found[0] else (found[0], "")
    return [head, *sorted(part.strip() for part in found)]


def test_upgrade_from_nothing_gives_the_schema_of_the_models(either: str) -> None:
    assert schema.current(either) is None

    schema.upgrade(either)

    assert schema.current(either) == schema.head()
    engine = make_engine(either)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_constraints_and_views_too_are_those_of_the_models(url: str, path: Path, tmp_path: Path) -> None:
    schema.upgrade(url)
    other = tmp_path / "models.sqlite3"
    engine = make_engine(f"sqlite:///{other}")
    Base.metadata.create_all(engine)
    engine.dispose()

    assert definitions(path) == definitions(other)
    assert {name for kind, name in definitions(path) if kind == "view"} == {*VIEWS, "decode_steps"}


def test_down_to_nothing_and_up_again(url: str, path: Path) -> None:
    schema.upgrade(url)
    before = definitions(path)

    schema.downgrade(url, "base")
    assert (schema.current(url), definitions(path)) == (None, {})

    schema.upgrade(url)
    assert definitions(path) == before


def test_down_one_by_one_and_up_again_with_the_jobs_that_were_there(either: str) -> None:
    schema.upgrade(either)
    before = tables_and_views(either)
    database = Database.open(either)
    record(database, metadata={"name": "Nightly", "team": "search"})
    flush(database, "w1", whole(claim_one(database).lease, 1, 2))
    with database.write() as session:
        speedup_checks.save_check(session, "", "job-1", [SpeedupCheckResult(0, error_code="poison")])
    database.dispose()

    down = 0
    while (current := schema.current(either)) is not None and current != "0001":
        schema.downgrade(either, "-1")
        down += 1
    assert down >= 2
    schema.upgrade(either)
    assert tables_and_views(either) == before
    database = Database.open(either)
    with database.read() as session:
        assert session.connection().exec_driver_sql("SELECT status FROM jobs").all() == [("completed",)]
        assert session.connection().exec_driver_sql("SELECT emitted_tokens FROM job_speedup").all() == [(2,)]
        (found,) = queries.jobs(session, 2, wanted=JobFilter(labels=(("team", "search"),), search="nightly")).jobs
    assert found.name == "Nightly"
    database.dispose()

    schema.downgrade(either, "base")
    assert tables_and_views(either) == set()


def test_an_old_worker_s_rows_are_welcome_on_the_new_schema(either: str) -> None:
    """An old version writes none of the newer columns: each has a default or allows NULL."""
    schema.upgrade(either, "0001")
    old = _columns(either)
    schema.upgrade(either)
    added = {
        (table, column["name"]): column
        for table, columns in _columns(either).items()
        if table in old
        for column in columns
        if column["name"] not in {c["name"] for c in old[table]}
    }
    assert added
    assert [name for name, column in added.items() if not column["nullable"] and column["default"] is None] == []


def _columns(url: str) -> dict[str, list[Any]]:
    engine = make_engine(url)
    found = inspect(engine)
    columns: dict[str, list[Any]] = {table: list(found.get_columns(table)) for table in found.get_table_names()}
    engine.dispose()
    return columns


def test_upgrading_again_keeps_the_jobs(either: str) -> None:
    schema.upgrade(either)
    database = Database.open(either)
    record(database)
    flush(database, "w1", whole(claim_one(database).lease, 1, 2))

    schema.upgrade(either)

    with database.read() as session:
        assert session.connection().exec_driver_sql("SELECT status FROM jobs").all() == [("completed",)]
    database.dispose()


def test_a_migration_that_fails_leaves_the_database_as_it_was(url: str, path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE outputs (mine TEXT)")  # makes the migration fail half-way
    connection.close()
    before = definitions(path)

    with pytest.raises(Exception, match="outputs already exists"):
        schema.upgrade(url)

    assert definitions(path) == before
    assert schema.current(url) is None


def test_concurrent_upgrades_are_serialised(either: str) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def upgrade() -> None:
        start.wait()
        try:
            schema.upgrade(either)
        except BaseException as exc:  # raised in the test below
            failures.append(exc)

    threads = [threading.Thread(target=upgrade) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert schema.current(either) == schema.head()


def test_steps_of_before_are_packed_though_the_upgrade_is_killed_again_and_again(either: str) -> None:
    """Rows of before are whole or half converted after each kill; the view shows each step once all the time."""
    schema.upgrade(either, "0012")
    _insert_old_steps(either, requests=6, steps=40)
    before = _steps(either)
    _run_upgrade(either, rows_at_once=23, dies_after=0)
    assert _unpacked(either) == 240
    for batches in (1, 2, 3):
        _run_upgrade(either, rows_at_once=23, dies_after=batches)
        assert _steps(either) == before
    assert _unpacked(either) == 240 - 6 * 23
    assert schema.has_unpacked_steps(either)

    packed: list[tuple[int, int]] = []
    schema.upgrade(either, on_packed=lambda *count: packed.append(count))

    left = 240 - 6 * 23
    assert (_steps(either), packed) == (before, [(left, left)])
    assert not schema.has_unpacked_steps(either)
    schema.downgrade(either, "0012")
    assert _steps(either) == before


def _run_upgrade(url: str, rows_at_once: int, dies_after: int) -> None:
    """Upgrade in a process that kills itself with SIGKILL inside the batch after this many."""
    program = f"""
import os, signal
from storage import schema
from storage.steps import conversion
moved, move = [], conversion._move
def dying(connection, rows):
    key = move(connection, rows)
    if len(moved) == {dies_after}:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(key)
    return key
conversion._move, conversion._PAUSE_S = dying, 0
conversion.pack_steps.__defaults__ = ({rows_at_once},)
schema.upgrade({url!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL


def _unpacked(url: str) -> int:
    engine = make_engine(url)
    left = unpacked_steps(engine)
    engine.dispose()
    return left


def _insert_old_steps(url: str, requests: int, steps: int) -> None:
    """Insert outputs' steps as a worker of revision 0012 did, in hundredths of a millisecond."""
    engine = make_engine(url)
    names = ", ".join(FIRST_COLUMNS)
    marks = ", ".join(f":{name}" for name in FIRST_COLUMNS)
    with write_connection(engine) as connection:
        job = "'job-1', 'completed', 'tiny', '/v1/completions', 1.0, 9.0, 0, 0, 0, 0, 0, ''"
        connection.execute(
            text(
                "INSERT INTO jobs (id, status, model, endpoint, created_at, expires_at, requests_total,"
                " requests_completed, requests_failed, prompt_tokens, completion_tokens, api_key_id)"
                f" VALUES ({job})"
            )
        )
        for index in range(requests):
            connection.execute(
                text(
                    "INSERT INTO requests (job_id, request_index, custom_id, status, attempts, lease_number)"
                    f" VALUES ('job-1', {index}, 'r{index}', 'completed', 1, 1)"
                )
            )
        rows = [_old_step(index, step) for index in range(requests) for step in range(steps)]
        connection.execute(text(f"INSERT INTO decode_steps ({names}) VALUES ({marks})"), rows)
    engine.dispose()


def _old_step(index: int, step: int) -> dict[str, Any]:
    row = asdict(a_step(step=step, step_ms=10.0 + step / 100, ended_at=1.7e9 + step / 4, batch_sequences=1 + step % 3))
    row |= {"job_id": "job-1", "request_index": index, "choice_index": index % 2, "worker_id": f"w{step // 25}"}
    row |= {"reached": "[[2, 0], [1, null]]" if step % 2 else None, "decision": "tree" if step % 2 else None}
    row |= {"plain_step_ms": 9.0 if step else None, "expected_accepted": 0.125 * step if step % 5 else None}
    return {name: row[name] for name in FIRST_COLUMNS}


def _steps(url: str) -> list[tuple[object, ...]]:
    engine = make_engine(url)
    with engine.connect() as connection:
        order = ", ".join(FIRST_COLUMNS[:4])
        rows = connection.execute(text(f"SELECT {', '.join(FIRST_COLUMNS)} FROM decode_steps ORDER BY {order}")).all()
    engine.dispose()
    return [tuple(value.replace(" ", "") if isinstance(value, str) else value for value in row) for row in rows]


def test_an_old_worker_inserts_its_steps_as_before(either: str) -> None:
    """Old workers run beside new ones during an upgrade: they copy rows into `decode_steps`."""
    schema.upgrade(either, "0012")
    _insert_old_steps(either, requests=2, steps=5)
    before = _steps(either)
    database = Database.open(either)
    with database.write() as session:
        session.execute(text("DELETE FROM decode_steps"))
    schema.upgrade(either)
    rows = [_old_step(index, step) for index in range(2) for step in range(5)]
    with database.write() as session:
        if session.get_bind().dialect.name == "postgresql":
            driver: Any = session.connection().connection.driver_connection
            names = ", ".join(FIRST_COLUMNS)
            with driver.cursor() as cursor, cursor.copy(f"COPY decode_steps ({names}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(list(row.values()))
        else:
            marks = ", ".join(f":{name}" for name in FIRST_COLUMNS)
            session.execute(text(f"INSERT INTO decode_steps ({', '.join(FIRST_COLUMNS)}) VALUES ({marks})"), rows)
    database.dispose()

    assert _steps(either) == before


def test_the_views_answer_the_shell(url: str, path: Path) -> None:
    schema.upgrade(url)
    database = Database.open(url)
    record(database)
    lease = claim_one(database).lease
    steps = (*some_steps(1, 3), a_step(step=2, reached=((2, 1), (1, None)), ended_at=120.0))
    flush(
        database, "w1", RequestProgress(lease, (a_checkpoint(seq=1, steps=steps),), (a_finished_choice(),), ends=True)
    )
    with database.write() as session:
        writes.add_energy(session, "w1", 120.0, 50.0)
        speedup_checks.save_check(session, "w1", lease.job_id, [SpeedupCheckResult(0, 4, 1.0, 2.0, 1.0, True)])
    database.dispose()

    with sqlite3.connect(path) as shell:
        rows = {name: shell.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in VIEWS}
    shell.close()
    assert rows == {
        "job_speedup": 1,
        "speedup_by_model": 1,
        "speedup_by_drafter": 1,
        "speedup_by_hour": 1,
        "throughput_by_minute": 2,
        "acceptance_by_depth": 6,
        "acceptance_by_rank": 2,
        "acceptance_histogram": 2,
        "tree_by_batch": 1,
        "expected_and_accepted": 1,
        "reliability": 1,
        "time_by_job": 1,
        "decisions_by_job": 1,
        "tokens_per_joule": 1,
        "job_comparison": 1,
    }


def test_sums_of_steps_that_were_there_before_are_those_that_workers_keep(url: str, path: Path) -> None:
    """Downgrade to before the sums and upgrade again: the migration sums existing steps."""
    schema.upgrade(url)
    database = Database.open(url)
    record(database, "job-1", 2)
    record(database, "job-2")
    steps = [
        a_step(step=0, tree_nodes=0, tree_depth=0, accepted_tokens=0, emitted_tokens=1, plain_step_ms=None),
        a_step(step=1, ended_at=119.5, batch_sequences=3, expected_accepted=0.3),
        a_step(step=2, ended_at=120.0, drafter=None, decision="probe", tree_nodes=0, tree_depth=0, accepted_tokens=0),
        a_step(step=3, ended_at=120.5, drafter="head", decision=None, expected_accepted=None),
    ]
    claims = claim(database, limit=3)
    for claimed, count in zip(claims, (4, 3, 2), strict=True):
        checkpoint = a_checkpoint(seq=1, steps=tuple(steps[:count]))
        flush(database, "w1", RequestProgress(claimed.lease, (checkpoint,), (a_finished_choice(),), ends=True))
    kept = sums(path)
    assert all(kept.values())

    schema.downgrade(url, "0002")
    schema.upgrade(url)

    assert sums(path) == kept
    database.dispose()


def sums(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of the sums that can be computed from steps of earlier versions."""
    with sqlite3.connect(path) as shell:
        tables = ("step_minutes", "step_batches", "step_depths", "step_expectations")
        rows = {table: sorted(shell.execute(f"SELECT * FROM {table}").fetchall()) for table in tables}
    shell.close()
    return {table: [tuple(map(rounded, row)) for row in found] for table, found in rows.items()}


def rounded(value: object) -> object:
    """Round floats, whose sums depend on the order of addition."""
    return round(value, 9) if isinstance(value, float) else value
