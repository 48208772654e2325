"""Each law of a `database` is written once and runs in two tiers: unit on SQLite, integration on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.session import LONG_STATEMENT_TIMEOUT_S, Database
from tests.databases import make_empty, on_shared_sqlite, open_sqlite

KINDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]


@pytest.fixture(scope="session")
def postgresql(postgresql_url: str) -> Iterator[Database]:
    """The database of all tests on PostgreSQL, with its connections; users empty it."""
    database = Database.open(postgresql_url, statement_timeout_s=LONG_STATEMENT_TIMEOUT_S)
    yield database
    database.dispose()


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database."""
    if request.param == "sqlite":
        with on_shared_sqlite(tmp_path) as database:
            yield database
    else:
        database = request.getfixturevalue("postgresql")
        make_empty(database.engine)
        yield database


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """An empty SQLite database with an engine of its own, set up as in a process of the service."""
    database = open_sqlite(tmp_path / "basic.sqlite3")
    yield database
    database.dispose()
