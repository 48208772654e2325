from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from storage import schema
from storage.models import Base
from storage.session import Database, make_engine
from storage.views import VIEWS
from tests.unit.storage.acts import claim_one, flush, record, whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "basic.sqlite3"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


def definitions(path: Path) -> dict[tuple[str, str], list[str]]:
    """All that a database consists of, as SQLite keeps it, without the layout and the order within a table."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {(kind, name): parts(sql) for kind, name, sql in rows if name != "alembic_version"}


def parts(sql: str) -> list[str]:
    """The columns and constraints of a definition in alphabetical order: a column added later stands last."""
    depth, found = 0, [""]
    for letter in " ".join(sql.split()):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 1:
            found.append("")
        elif depth or letter != ")":
            found[-1] += letter
    head, found[0] = found[0].split("(", 1) if "(" in found[0] else (found[0], "")
    return [head, *sorted(part.strip() for part in found)]


def test_upgrade_from_nothing_gives_the_schema_of_the_models(url: str) -> None:
    assert schema.current(url) is None

    schema.upgrade(url)

    assert schema.current(url) == schema.head()
    engine = make_engine(url)
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
    assert {name for kind, name in definitions(path) if kind == "view"} == set(VIEWS)


def test_down_to_nothing_and_up_again(url: str, path: Path) -> None:
    schema.upgrade(url)
    before = definitions(path)

    schema.downgrade(url, "base")
    assert (schema.current(url), definitions(path)) == (None, {})

    schema.upgrade(url)
    assert definitions(path) == before


def test_upgrading_again_keeps_the_jobs(url: str) -> None:
    schema.upgrade(url)
    database = Database.open(url)
    record(database)
    flush(database, "w1", whole(claim_one(database).lease, 1, 2))

    schema.upgrade(url)

    with database.read() as session:
        assert session.connection().exec_driver_sql("SELECT status FROM jobs").all() == [("completed",)]
    database.dispose()


def test_a_migration_that_fails_leaves_the_database_as_it_was(url: str, path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE outputs (mine TEXT)")  # stands in the way half way through
    connection.close()
    before = definitions(path)

    with pytest.raises(Exception, match="outputs already exists"):
        schema.upgrade(url)

    assert definitions(path) == before
    assert schema.current(url) is None


def test_two_that_upgrade_at_once_do_not_meet(url: str) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def upgrade() -> None:
        start.wait()
        try:
            schema.upgrade(url)
        except BaseException as exc:  # told to the test below
            failures.append(exc)

    threads = [threading.Thread(target=upgrade) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert schema.current(url) == schema.head()


def test_the_views_answer_the_shell(url: str, path: Path) -> None:
    schema.upgrade(url)
    database = Database.open(url)
    record(database)
    flush(database, "w1", whole(claim_one(database).lease, 1, 3, 2))
    database.dispose()

    with sqlite3.connect(path) as shell:
        rows = {name: shell.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in VIEWS}
    shell.close()
    assert rows == {"job_speedup": 1, "acceptance_by_depth": 6, "throughput_by_minute": 1}
