"""Empty databases for tests, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Engine, text

from storage.models import Base
from storage.session import STATEMENT_TIMEOUT_S, Database, make_engine, write_connection

# One statement list, children before parents. TRUNCATE recreates every table and index, which takes 50 times as long.
_EMPTY = ";".join(f"DELETE FROM {table.name}" for table in reversed(Base.metadata.sorted_tables))


def open_sqlite(path: Path) -> Database:
    """Return an empty database in a new file; the caller disposes of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_empty_file())
    return Database.open(f"sqlite:///{path}")


@cache
def _empty_file() -> bytes:
    """Return the bytes of an empty database file: copying them is faster than creating the tables."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "basic.sqlite3"
        engine = make_engine(f"sqlite:///{path}")
        Base.metadata.create_all(engine)
        engine.dispose()
        return path.read_bytes()


@contextmanager
def on_sqlite(directory: Path) -> Iterator[Database]:
    """Yield an empty database in a new file."""
    database = open_sqlite(directory / "basic.sqlite3")
    yield database
    database.dispose()


@contextmanager
def on_postgresql(url: str, *, statement_timeout_s: float | None = STATEMENT_TIMEOUT_S) -> Iterator[Database]:
    """Yield a PostgreSQL database that only tests use, after deleting all its rows."""
    database = Database.open(url, statement_timeout_s=statement_timeout_s)
    make_empty(database.engine)
    yield database
    database.dispose()


def drop_schema(url: str) -> None:
    """Drop everything in a PostgreSQL database."""
    engine = make_engine(url)
    with write_connection(engine) as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


def make_empty(engine: Engine) -> None:
    """Delete all rows of a PostgreSQL database; create the tables if there are none."""
    with write_connection(engine) as connection:
        if connection.scalar(text("SELECT to_regclass('jobs')")) is None:
            Base.metadata.create_all(connection)
        connection.exec_driver_sql(_EMPTY)
