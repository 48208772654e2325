"""`basic db upgrade` on a database of a newer version."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from jobs.cli.app import app
from jobs.errors import SetupError
from storage import schema
from storage.session import make_engine, write_connection
from tests.databases import write_migrated


def test_a_database_of_a_newer_version_is_left_as_it_is_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'basic.sqlite3'}"
    monkeypatch.setenv("BASIC_DATABASE_URL", url)
    write_migrated(tmp_path / "basic.sqlite3")
    engine = make_engine(url)
    with write_connection(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()

    refused = CliRunner().invoke(app, ["db", "upgrade"])

    assert isinstance(refused.exception, SetupError)
    assert "revision 9999 of a newer version" in str(refused.exception)
    assert schema.current(url) == "9999"
