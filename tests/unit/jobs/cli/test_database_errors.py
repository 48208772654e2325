"""An unavailable database or an invalid URL is one sentence and an exit status in every command that needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.app import app
from jobs.errors import BasicError, DatabaseUnavailable, SetupError
from jobs.schema_check import exit_status, explain_database_errors, upgrade_schema
from storage import schema
from storage.session import Database, make_engine, write_connection
from tests.databases import write_migrated

AWAY = "postgresql://me:secret@127.0.0.1:1/x"
COMMANDS = [
    ("db", "upgrade"),
    ("db", "prune", "--steps-older-than", "1d"),
    ("keys", "list"),
    ("keys", "create", "alice"),
    ("keys", "revoke", "alice"),
]


def bad_urls(directory: Path) -> dict[str, str]:
    (directory / "text.sqlite3").write_text("no database, though long enough to be looked at as one: " * 4)
    (directory / "folder.sqlite3").mkdir()
    return {
        "nonsense": "BASIC_DATABASE_URL can't be used.*write postgresql://",
        "mysql://a@b/c": "not mysql; write postgresql://",
        "postgresql://x@h:port/db": "could not parse it",
        "postgresql://x@127.0.0.1:1/x?foo=1": "foo",
        "postgresql+asyncpg://x@127.0.0.1:1/x": "asyncpg.*write the database's URL",
        f"sqlite:///{directory}/x.sqlite3?foo=1": "SQLite has no option foo",
        f"sqlite:///{directory}/text.sqlite3": "can't be used: file is not a database",
        f"sqlite:///{directory}/folder.sqlite3": "can't be used: unable to open",
        f"sqlite:///{directory}/text.sqlite3/x.sqlite3": "can't be used",
        AWAY: "can't be used: connection failed.*check that it can be reached",
    }


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_says_in_one_sentence_that_the_database_is_away(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASIC_DATABASE_URL", AWAY)
    said = CliRunner().invoke(app, command).exception
    assert isinstance(said, DatabaseUnavailable)
    assert "connection failed" in str(said)
    assert "secret" not in str(said)


def test_a_url_that_names_no_usable_database_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    for url, sentence in bad_urls(tmp_path).items():
        for start in (schema.upgrade, schema.current, upgrade_schema):
            with pytest.raises(BasicError, match=sentence), explain_database_errors(url):
                start(url)


def test_a_database_of_a_newer_version_is_not_touched_and_the_sentence_says_so(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'newer.sqlite3'}"
    write_migrated(tmp_path / "newer.sqlite3")
    with write_connection(make_engine(url)) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SetupError, match=r"9999 of a newer version of bASIC"):
        upgrade_schema(url)


def test_another_start_may_work_when_the_database_is_away_and_not_when_its_url_is_wrong() -> None:
    assert exit_status(DatabaseUnavailable()) == 75
    assert exit_status(SetupError()) == 78


def test_opening_a_good_database_says_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'basic.sqlite3'}"
    with explain_database_errors(url):
        schema.upgrade(url)
        Database.open(url).dispose()
