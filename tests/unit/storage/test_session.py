from __future__ import annotations

import os
import string
import threading
from pathlib import Path

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, OperationalError

from storage import queries
from storage.dialect import database_now
from storage.models import Base
from storage.session import Database, is_read_only
from storage.settings import sqlite_file, sqlite_url
from tests.databases import never_sync
from tests.unit.storage.acts import record


def test_the_directory_of_a_database_is_made(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path / 'a' / 'b' / 'basic.sqlite3'}")
    Base.metadata.create_all(database.engine)
    database.dispose()

    assert (tmp_path / "a" / "b" / "basic.sqlite3").exists()


def test_a_sqlite_file_may_have_any_name_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for number, character in enumerate((*string.punctuation.replace("/", ""), " ", "\n", "é", "%41", "?mode=ro")):
            file = tmp_path / str(number) / f"a{character}b" / f"basic{character}.sqlite3"
            url = sqlite_url(file)
            assert sqlite_file(url) == file
            database = Database.open(url)
            event.listen(database.engine, "connect", never_sync)
            with database.write() as session:
                session.connection().exec_driver_sql("CREATE TABLE one (id INTEGER)")
            named = sorted(file.parent.iterdir())
            database.dispose()
            assert named == [file, *(file.with_name(file.name + end) for end in ("-shm", "-wal"))]
            assert [path for path in (file.parent, *named) if path.exists() and path.stat().st_mode & 0o077] == []
    finally:
        os.umask(before)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true", "postgresql://a/b"])
def test_a_url_that_names_no_file_has_none(url: str) -> None:
    assert sqlite_file(url) is None


def test_connections_are_set_up_for_many_processes(sqlite: Database) -> None:
    with sqlite.read() as session:
        pragmas = {
            name: session.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "busy_timeout", "synchronous", "foreign_keys")
        }

    assert pragmas == {"journal_mode": "wal", "busy_timeout": 10_000, "synchronous": 1, "foreign_keys": 1}


def test_a_writer_that_fails_leaves_nothing(database: Database) -> None:
    record(database)

    def fail_half_way() -> None:
        with database.write() as session:
            session.execute(text("UPDATE jobs SET requests_total = 7"))
            session.execute(text("UPDATE jobs SET status = 'no such status'"))

    with pytest.raises(IntegrityError):
        fail_half_way()

    with database.read() as session:
        assert session.execute(text("SELECT requests_total FROM jobs")).scalar() == 1


def test_a_reader_sees_one_state_while_a_writer_commits(database: Database) -> None:
    with database.read() as session:
        assert queries.jobs(session, 5).jobs == ()
        record(database)
        assert queries.jobs(session, 5).jobs == ()
    with database.read() as session:
        assert len(queries.jobs(session, 5).jobs) == 1


def test_concurrent_writers_wait_for_each_other_and_none_fails(database: Database) -> None:
    """Each reads before it writes: if the lock were taken only at the write, SQLite would fail all but one."""
    record(database)

    def add_many() -> None:
        for _ in range(20):
            with database.write() as session:
                total = session.execute(text("SELECT requests_total FROM jobs" + for_update)).scalar_one()
                session.execute(text("UPDATE jobs SET requests_total = :total"), {"total": total + 1})

    for_update = " FOR UPDATE" if database.engine.dialect.name == "postgresql" else ""
    threads = [threading.Thread(target=add_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with database.read() as session:
        assert session.execute(text("SELECT requests_total FROM jobs")).scalar() == 81


def test_a_database_that_cannot_be_opened_is_an_operational_error(tmp_path: Path) -> None:
    (tmp_path / "basic.sqlite3").mkdir()
    database = Database.open(f"sqlite:///{tmp_path / 'basic.sqlite3'}")

    with pytest.raises(OperationalError), database.read() as session:
        session.execute(text("SELECT 1"))


def test_the_clock_of_the_database_runs_in_unix_seconds(database: Database) -> None:
    with database.read() as session:
        first, second = database_now(session), database_now(session)

    assert 1_600_000_000 < first <= second < first + 60


def test_a_read_only_file_can_be_read_and_a_write_raises(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    record(sqlite)
    sqlite.dispose()
    monkeypatch.setattr("storage.session.os.access", lambda *_: False)

    with sqlite.read() as session:
        assert len(queries.jobs(session, 5).jobs) == 1
    with pytest.raises(OperationalError) as refused:
        record(sqlite, "job-2")
    assert is_read_only(refused.value)
