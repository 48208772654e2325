"""`basic db backup | restore` with PostgreSQL's own programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from jobs.errors import SetupError
from jobs.upkeep.backup import back_up, restore
from storage import schema
from storage.backup import drop_tables
from storage.session import Database, make_engine, write_connection
from tests.databases import drop_schema
from tests.postgres import programs
from tests.unit.storage.acts import check_laws, claim, claim_one, everything, flush, going_on, record, view


@pytest.fixture
def url(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A database at the newest version; pg_dump and pg_restore are found."""
    monkeypatch.setenv("PATH", str(programs()), prepend=":")
    drop_schema(postgresql_url)
    schema.upgrade(postgresql_url)
    yield postgresql_url
    drop_schema(postgresql_url)


def test_a_running_request_of_a_dump_continues_after_its_database_was_lost(url: str, tmp_path: Path) -> None:
    file = tmp_path / "a.backup"
    database = Database.open(url)
    record(database, "job-1", 2)
    flush(database, "w1", going_on(claim_one(database, "w1", lease_s=3600.0), 1, 1))
    assert back_up(url, file).open_jobs == 1
    assert file.stat().st_mode & 0o777 == 0o600
    record(database, "job-2", 1)
    with pytest.raises(SetupError, match="holds 2 jobs"):
        restore(url, file)
    before = everything(database)
    database.dispose()

    # A table of someone else stays.
    engine = make_engine(url)
    with write_connection(engine) as connection:
        connection.execute(text("CREATE TABLE another AS SELECT 7 AS seven"))
    assert restore(url, file, replace=True).requeued_requests == 1
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT seven FROM another")) == 7
    engine.dispose()

    database = Database.open(url)
    first, second = sorted(claim(database, "w2", 2), key=lambda one: one.lease.key)
    assert (first.attempts, [len(one.token_ids) for one in first.checkpoints]) == (1, [2])
    flush(database, "w2", going_on(first, 1, ends=True), going_on(second, 1, ends=True))
    assert view(database).status == "completed"
    assert {name for name, rows in everything(database).items() if rows} <= before.keys()
    check_laws(database)
    database.dispose()


def test_the_programs_get_the_password_by_their_environment(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "pg_dump"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo "pg_dump (PostgreSQL) 99.1"\n'
        f'echo "$PGPASSWORD $*" > {tmp_path}/said; echo "pg_dump: error: no such luck" >&2; exit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    secret = make_url(url).set(password="hunter2").render_as_string(hide_password=False)
    with pytest.raises(SetupError, match="pg_dump failed: pg_dump: error: no such luck"):
        back_up(secret, tmp_path / "a.backup")
    password, _, arguments = (tmp_path / "said").read_text().partition(" ")
    assert password == "hunter2"
    assert "hunter2" not in arguments
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pg_dump", "said"]


def test_programs_that_are_older_than_the_server_are_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "pg_dump"
    program.write_text('#!/bin/sh\necho "pg_dump (PostgreSQL) 9.6"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SetupError, match=r"of version 9 and the server of version \d\d"):
        back_up(url, tmp_path / "a.backup")


def test_dropping_the_tables_leaves_nothing_of_ours(url: str) -> None:
    drop_tables(url)
    engine = make_engine(url)
    with engine.connect() as connection:
        left = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert connection.scalar(text(left)) == 0
    engine.dispose()
    schema.upgrade(url)
