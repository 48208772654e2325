"""Empty records for tests, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Engine, text

from storage.models import Base
from storage.session import STATEMENT_TIMEOUT_S, Database, make_engine, write_connection

# All at once, children before their parents. TRUNCATE makes every table and index anew, which takes 50 times as long.
_EMPTY = ";".join(f"DELETE FROM {table.name}" for table in reversed(Base.metadata.sorted_tables))


def open_sqlite(path: Path) -> Database:
    """Return an empty record in a new file; the caller disposes of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_empty_file())
    return Database.open(f"sqlite:///{path}")


@cache
def _empty_file() -> bytes:
    """Return the file of an empty record: to copy it is quicker than to make it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "basic.sqlite3"
        engine = make_engine(f"sqlite:///{path}")
        Base.metadata.create_all(engine)
        engine.dispose()
        return path.read_bytes()


@contextmanager
def on_sqlite(directory: Path) -> Iterator[Database]:
    """Yield an empty record in a file of its own."""
    database = open_sqlite(directory / "basic.sqlite3")
    yield database
    database.dispose()


@contextmanager
def on_postgresql(url: str, *, statement_timeout_s: float | None = STATEMENT_TIMEOUT_S) -> Iterator[Database]:
    """Yield an empty record in a database that only tests use: whatever was there is gone."""
    database = Database.open(url, statement_timeout_s=statement_timeout_s)
    make_empty(database.engine)
    yield database
    database.dispose()


def drop_schema(url: str) -> None:
    """Take a PostgreSQL database back to nothing."""
    engine = make_engine(url)
    with write_connection(engine) as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


def make_empty(engine: Engine) -> None:
    """Empty all tables of a PostgreSQL database; make them if there are none."""
    with write_connection(engine) as connection:
        if connection.scalar(text("SELECT to_regclass('jobs')")) is None:
            Base.metadata.create_all(connection)
        connection.exec_driver_sql(_EMPTY)
