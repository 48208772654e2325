from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.models import Base
from storage.session import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An empty record: SQLite, or the PostgreSQL database that TEST_POSTGRES_URL names (it is emptied)."""
    database = Database.open(os.environ.get("TEST_POSTGRES_URL", f"sqlite:///{tmp_path / 'basic.sqlite3'}"))
    Base.metadata.drop_all(database.engine)
    Base.metadata.create_all(database.engine)
    yield database
    database.dispose()
