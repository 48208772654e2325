"""Empty records for tests, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import inspect, text

from storage.models import Base
from storage.session import Database, make_engine, write_connection


@contextmanager
def on_sqlite(directory: Path) -> Iterator[Database]:
    """Yield an empty record in a file of its own."""
    database = Database.open(f"sqlite:///{directory / 'basic.sqlite3'}")
    Base.metadata.create_all(database.engine)
    yield database
    database.dispose()


@contextmanager
def on_postgresql(url: str) -> Iterator[Database]:
    """Yield an empty record in a database that only tests use: whatever was there is gone."""
    make_empty(url)
    database = Database.open(url)
    yield database
    database.dispose()


def drop_schema(url: str) -> None:
    """Take a PostgreSQL database back to nothing."""
    engine = make_engine(url)
    with write_connection(engine) as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


def make_empty(url: str) -> None:
    """Empty all tables of a PostgreSQL database; make them if there are none. To empty is quicker than to make."""
    engine = make_engine(url)
    if not inspect(engine).has_table("jobs"):
        Base.metadata.create_all(engine)
    with write_connection(engine) as connection:
        connection.execute(text(f"TRUNCATE {', '.join(Base.metadata.tables)}"))
    engine.dispose()
