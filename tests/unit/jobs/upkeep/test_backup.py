"""A backup holds one moment of the database. Restored, it continues: no request is lost, counted twice or suspected."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.app import app
from jobs.errors import SetupError
from jobs.upkeep.backup import back_up, restore
from storage.leader_election import elect
from storage.models import Request
from storage.session import Database
from storage.settings import sqlite_url
from tests.databases import write_migrated
from tests.unit.storage.acts import check_laws, claim, claim_one, flush, going_on, record, view


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source.sqlite3"
    write_migrated(file)
    return file


@pytest.fixture
def filled(source: Path) -> Path:
    """A database with a job of two requests, of which one runs and has two committed tokens."""
    database = Database.open(sqlite_url(source))
    record(database, "job-1", 2)
    claimed = claim_one(database, "w1", lease_s=3600.0)
    flush(database, "w1", going_on(claimed, 1, 1))
    database.dispose()
    return source


def test_a_running_request_continues_in_the_restored_database_and_its_attempt_does_not_count(
    filled: Path, tmp_path: Path
) -> None:
    file, target = tmp_path / "a.backup", tmp_path / "target.sqlite3"
    done = back_up(sqlite_url(filled), file)
    assert (done.jobs, done.open_jobs) == (1, 1)
    assert file.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("*.backup-*")), "the copy needs no journal"

    restored = restore(sqlite_url(target), file)
    assert (restored.jobs, restored.open_jobs, restored.requeued_requests) == (1, 1, 1)
    database = Database.open(sqlite_url(target))
    with database.read() as session:
        row = session.get_one(Request, ("job-1", 0))
        assert (row.status, row.attempts, row.suspect_group) == ("queued", 0, None)
    continued = claim(database, "w2", 2)
    (first, second) = sorted(continued, key=lambda one: one.lease.key)
    assert (first.attempts, [len(one.token_ids) for one in first.checkpoints]) == (1, [2]), (
        "it continues from its tokens"
    )
    flush(database, "w2", going_on(first, 1, ends=True), going_on(second, 1, ends=True))
    assert view(database).status == "completed"
    check_laws(database)
    database.dispose()


def test_what_is_written_after_the_backup_is_not_in_it(filled: Path, tmp_path: Path) -> None:
    file, target = tmp_path / "a.backup", tmp_path / "target.sqlite3"
    database = Database.open(sqlite_url(filled))
    with database.read() as reader:  # another connection, in the middle of its work
        reader.get_one(Request, ("job-1", 0))
        back_up(sqlite_url(filled), file)
    record(database, "job-2", 1)
    database.dispose()
    assert restore(sqlite_url(target), file).jobs == 1


def test_a_database_that_holds_something_is_replaced_only_if_told(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, target = tmp_path / "a.backup", tmp_path / "target.sqlite3"
    write_migrated(target)
    database = Database.open(sqlite_url(target))
    record(database, "job-9", 1)
    monkeypatch.setenv("BASIC_DATABASE_URL", sqlite_url(filled))
    assert "Wrote 1 jobs (1 open)" in CliRunner().invoke(app, ["db", "backup", str(file)]).output

    monkeypatch.setenv("BASIC_DATABASE_URL", sqlite_url(target))
    refused = CliRunner().invoke(app, ["db", "restore", str(file)])
    assert "holds 1 jobs, 0 files and 0 keys" in str(refused.exception)
    assert "--replace" in str(refused.exception)
    assert view(database, "job-9").id == "job-9", "nothing was changed"

    done = CliRunner().invoke(app, ["db", "restore", str(file), "--replace"])
    assert done.exit_code == 0, done.exception
    assert "1 are open and continue when workers start" in done.output
    assert view(database, "job-1").id == "job-1"
    database.dispose()


def test_nothing_is_restored_below_a_running_service(filled: Path, tmp_path: Path) -> None:
    file, target = tmp_path / "a.backup", tmp_path / "target.sqlite3"
    back_up(sqlite_url(filled), file)
    write_migrated(target)
    database = Database.open(sqlite_url(target))
    with database.write() as session:
        elect(session, "reconciler", "an API server", 600.0)
    with pytest.raises(SetupError, match="stop all workers and API servers first"):
        restore(sqlite_url(target), file, replace=True)
    database.dispose()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no backup"),
        (b"a text", "is no backup"),
        (b"PGDMP\x01", "is a backup of PostgreSQL, and the database is SQLite"),
        (b"SQLite format 3\0" + b"\xff" * 500, "can't be restored"),
    ],
)
def test_a_file_that_is_no_backup_is_named_and_nothing_is_changed(
    content: bytes, reason: str, source: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.backup"
    file.write_bytes(content)
    before = source.read_bytes()
    with pytest.raises(SetupError, match=reason):
        restore(sqlite_url(source), file, replace=True)
    assert source.read_bytes() == before


def test_a_backup_without_a_schema_of_ours_or_of_a_newer_version_is_refused(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.backup"
    back_up(sqlite_url(source), file)
    with sqlite3.connect(file) as copy:
        copy.execute("UPDATE alembic_version SET version_num = '9999_later'")
    with pytest.raises(SetupError, match="revision 9999_later of a newer version"):
        restore(sqlite_url(tmp_path / "target.sqlite3"), file)
    with sqlite3.connect(file) as copy:
        copy.execute("DROP TABLE alembic_version")
    with pytest.raises(SetupError, match="can't be restored"):
        restore(sqlite_url(tmp_path / "target.sqlite3"), file)
    assert not (tmp_path / "target.sqlite3").exists()


def test_a_backup_never_overwrites_a_file_and_needs_its_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.backup").write_text("mine")
    with pytest.raises(SetupError, match="exists; name a new file"):
        back_up(sqlite_url(source), tmp_path / "a.backup")
    with pytest.raises(SetupError, match="there is no folder"):
        back_up(sqlite_url(source), tmp_path / "missing/a.backup")
    assert (tmp_path / "a.backup").read_text() == "mine"


def test_postgresql_without_its_programs_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "a.backup"
    file.write_bytes(b"PGDMP\x01")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"pg_restore is not installed.*postgresql-client"):
        restore("postgresql://basic@127.0.0.1:1/basic", file)
