"""Empty databases for tests, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import Engine, event, text
from sqlalchemy.exc import OperationalError

from storage import schema
from storage.models import Base
from storage.session import STATEMENT_TIMEOUT_S, Database, make_engine, write_connection

# One statement list, children before parents. TRUNCATE recreates every table and index, which takes 50 times as long.
_TABLES = [table.name for table in reversed(Base.metadata.sorted_tables)]
_EMPTY = ";".join(f"DELETE FROM {table}" for table in _TABLES)
_FILLED = " UNION ALL ".join(f"SELECT '{table}' WHERE EXISTS (SELECT 1 FROM {table})" for table in _TABLES)


def open_sqlite(path: Path) -> Database:
    """Return an empty database in a new file; the caller disposes of it."""
    _write_empty(path)
    return Database.open(f"sqlite:///{path}")


def _write_empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_empty_file())


@cache
def _empty_file() -> bytes:
    """Return the bytes of an empty database file: copying them is faster than creating the tables."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "basic.sqlite3"
        engine = make_engine(f"sqlite:///{path}")
        Base.metadata.create_all(engine)
        engine.dispose()
        return path.read_bytes()


def write_migrated(path: Path) -> None:
    """Write an empty database as `basic db upgrade` leaves it, at the newest version."""
    path.write_bytes(_migrated_file())


@cache
def _migrated_file() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "basic.sqlite3"
        schema.upgrade(f"sqlite:///{path}")
        return path.read_bytes()


class _SharedDatabase:
    """One file and its connections for all tests of a process.

    A new engine compiles every statement again, and a new file costs each connection more than a small test does.
    """

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="basic-tests-")
        self.path = Path(self._folder.name) / "basic.sqlite3"
        self.database = open_sqlite(self.path)
        self.in_use = False
        event.listen(self.database.engine, "connect", never_sync)

    def empty(self) -> None:
        """Delete all rows; write a new file if a test changed the tables or kept a connection."""
        with suppress(OperationalError):
            if self._delete_rows():
                return
        self.database.dispose()
        for file in self.path.parent.iterdir():
            file.unlink()
        _write_empty(self.path)

    def _delete_rows(self) -> bool:
        engine = self.database.engine
        if engine.pool.checkedout():  # type: ignore[attr-defined]
            return False
        with write_connection(engine) as connection:
            if connection.exec_driver_sql("PRAGMA schema_version").scalar_one() != _schema_version():
                return False
            for (table,) in connection.exec_driver_sql(_FILLED).all():
                connection.exec_driver_sql(f"DELETE FROM {table}")
        return True


@cache
def _schema_version() -> int:
    """Return the number that SQLite changes with every change of a table."""
    return int.from_bytes(_empty_file()[40:44])


def never_sync(connection: Any, _record: object) -> None:
    """Leave it to the kernel when the file reaches the disk: no test pulls the plug."""
    connection.execute("PRAGMA synchronous = OFF")


_shared = cache(_SharedDatabase)


@contextmanager
def on_sqlite(directory: Path) -> Iterator[Database]:
    """Yield an empty database in a new file, with an engine of its own."""
    database = open_sqlite(directory / "basic.sqlite3")
    yield database
    database.dispose()


@contextmanager
def on_shared_sqlite(directory: Path) -> Iterator[Database]:
    """Yield the empty database of all unit tests, one test at a time; a link in the directory opens it, too."""
    shared = _shared()
    assert not shared.in_use
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "basic.sqlite3").symlink_to(shared.path)
    shared.in_use = True
    try:
        yield shared.database
    finally:
        shared.empty()
        shared.in_use = False


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
