"""Database connections: SQLite in WAL mode on one machine, PostgreSQL for several.

A Session is one read or one write transaction. Exceptions are SQLAlchemy's own: those in DATABASE_UNAVAILABLE mean that
the database is unreachable, busy, full or read-only; the whole transaction may be retried.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

DATABASE_UNAVAILABLE: Final = (OperationalError, InterfaceError, PoolTimeout)

_READ_ONLY_STATE: Final = "25006"
_BUSY_TIMEOUT_S = 10.0  # how long SQLite waits for another writer

# A server that hangs, or a network that drops packets, must not block a thread for longer than a few seconds.
_POSTGRESQL_LIMITS: Final = {
    "connect_timeout": "2",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}
_POOL: Final = {"pool_size": 5, "max_overflow": 40, "pool_timeout": 10}  # the API server has 40 threads
# Writers that wait for SQLite's lock hold a connection each: leave some for readers.
_SQLITE_POOL: Final = {"pool_size": 5, "max_overflow": 75, "pool_timeout": 10}

STATEMENT_TIMEOUT_S: Final = 4.5  # of one statement in an API call
LONG_STATEMENT_TIMEOUT_S: Final = 30.0  # of one statement in the background

# A read transaction sees one snapshot. `postgresql_readonly` is not set: the next write transaction on the connection
# would then declare READ WRITE, and bypass a database that is set to read-only.
_READING: Final = {"isolation_level": "REPEATABLE READ"}

_SQLITE_OPTIONS: Final = {"cached_statements", "check_same_thread", "detect_types", "isolation_level", "timeout"}

# The BEGIN statement of a transaction on SQLite. A writer takes the lock at once: a transaction that reads first and
# then finds the lock taken fails without waiting.
_BEGIN_OPTION = "sqlite_begin"
_WRITING = {_BEGIN_OPTION: "BEGIN IMMEDIATE"}

# Sessions hold no objects that an UPDATE would have to synchronise. Rows of one INSERT go into one statement, even if
# they differ in which columns are NULL.
_SESSION_OPTIONS = {"synchronize_session": False, "render_nulls": True}


@dataclass(frozen=True, slots=True)
class Database:
    """Read and write transactions on one database. One per process; safe to share between threads."""

    engine: Engine

    @classmethod
    def open(cls, url: str, *, statement_timeout_s: float | None = STATEMENT_TIMEOUT_S) -> Self:
        """Open the database at an SQLAlchemy URL. Connects when first used.

        `statement_timeout_s` limits each statement of PostgreSQL; None: no limit.
        """
        return cls(make_engine(url, statement_timeout_s))

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a read session that sees one snapshot."""
        engine = self.engine
        if engine.dialect.name == "postgresql":  # SQLite's transactions always are
            engine = engine.execution_options(**_READING)
        with Session(engine, execution_options=_SESSION_OPTIONS) as session:
            yield session

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Yield a connection for single queries that run with every API call: a session would double their cost."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a write session: committed at the end, rolled back by an exception."""
        engine = self.engine.execution_options(**_WRITING)
        with Session(engine, execution_options=_SESSION_OPTIONS) as session, session.begin():
            yield session

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def make_engine(url: str, statement_timeout_s: float | None = None) -> Engine:
    """Return an engine for SQLite (creates the file's directory) or PostgreSQL.

    `statement_timeout_s` limits each statement of PostgreSQL; None: no limit. Raise ArgumentError for any other URL.
    """
    try:
        parsed = make_url(url)
    except ValueError as exc:  # such as a port that is not a number
        raise ArgumentError(f"could not parse it ({exc})") from exc
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql", "postgres"):
        raise ArgumentError(f"the database must be PostgreSQL or SQLite, not {backend}")
    engine = _sqlite_engine(parsed) if backend == "sqlite" else _postgresql_engine(parsed, statement_timeout_s)
    event.listen(engine, "handle_error", _refused_to_write)
    return engine


def unavailable_reason(error: BaseException) -> str:
    """Return the driver's message about an unavailable database, without the statement and its values."""
    return " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())


def is_full(error: BaseException) -> bool:
    """Return whether the database could not write because its disk is full."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    return getattr(cause, "sqlite_errorname", "") == "SQLITE_FULL" or getattr(cause, "sqlstate", "") == "53100"


def is_too_large(error: BaseException) -> bool:
    """Return whether the database rejected a value for its size, also an OperationalError on PostgreSQL."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    return str(getattr(cause, "sqlstate", None) or "").startswith("54")


def is_read_only(error: BaseException) -> bool:
    """Return whether the database is read-only."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    named = getattr(cause, "sqlite_errorname", None) or ""
    return named.startswith("SQLITE_READONLY") or getattr(cause, "sqlstate", "") == _READ_ONLY_STATE


def _refused_to_write(context: ExceptionContext) -> OperationalError | None:
    """Turn PostgreSQL's read-only error into an OperationalError, so that it is in DATABASE_UNAVAILABLE."""
    cause = context.original_exception
    if getattr(cause, "sqlstate", "") != _READ_ONLY_STATE:
        return None
    return OperationalError(context.statement, context.parameters, cause)


@contextmanager
def write_connection(engine: Engine) -> Iterator[Connection]:
    """Yield a connection in one write transaction, without a session."""
    with engine.execution_options(**_WRITING).begin() as connection:
        yield connection


def _postgresql_engine(url: URL, statement_timeout_s: float | None) -> Engine:
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    limits = {name: value for name, value in _POSTGRESQL_LIMITS.items() if name not in url.query}
    engine = create_engine(url, pool_pre_ping=True, connect_args=limits, **_POOL)
    if statement_timeout_s is not None:
        from storage.postgres import limit_statements  # installations without PostgreSQL lack the driver

        limit_statements(engine, statement_timeout_s)
    return engine


def _sqlite_engine(url: URL) -> Engine:
    unknown = set() if "uri" in url.query else url.query.keys() - _SQLITE_OPTIONS
    if unknown:
        raise ArgumentError(f"SQLite has no option {min(unknown)}; a question mark in a path is written %3F")
    file = _file_of(url)
    if file is not None:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    pool = _SQLITE_POOL if file is not None else {}
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S}, **pool)
    if file is not None:
        event.listen(engine, "do_connect", lambda *given: _open_file(file, given[-1]))
    event.listen(engine, "connect", _prepare_connection)
    event.listen(engine, "begin", _begin)
    return engine


def _file_of(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None: in memory, or a URI that SQLite itself reads."""
    name = url.database or ":memory:"
    return None if name == ":memory:" or name.startswith("file:") else Path(name)


def _make_private(file: Path) -> None:
    """Create the file with mode 0600: SQLite would make it readable for all users. Journals inherit the mode."""
    with suppress(OSError):  # it exists, or SQLite reports the error
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _sqlite_connect(uri: str, options: Mapping[str, Any]) -> sqlite3.Connection:
    connection: sqlite3.Connection = sqlite3.connect(uri, uri=True, **options)
    return connection


def _open_file(file: Path, options: Mapping[str, Any]) -> sqlite3.Connection | None:
    """Open a read-only file; None: the file is writable, and SQLite opens it as usual."""
    _make_private(file)
    if (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)) or not file.is_file():
        return None
    uri = f"{file.absolute().as_uri()}?mode=ro"
    connection = _sqlite_connect(uri, options)
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        journal = file.with_name(f"{file.name}-wal")
        if journal.exists() and journal.stat().st_size:  # it holds the newest rows, which can't be read
            raise
        # SQLite can't create the journal's index in this directory: `immutable` makes it do without.
        return _sqlite_connect(f"{uri}&immutable=1", options)
    return connection


def _prepare_connection(connection: Any, _record: object) -> None:
    """Set per-connection options, and disable the driver's implicit BEGIN, which would come too late."""
    connection.isolation_level = None
    cursor = connection.cursor()
    _enable_wal(cursor)
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA secure_delete = ON")  # deleted prompts and texts leave the file; many builds do it anyway
    cursor.close()


def _enable_wal(cursor: Any) -> None:
    """Switch to write-ahead logging. The first switch needs an exclusive lock, for which SQLite does not wait."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
                return  # read-only: the first write raises the error
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN_OPTION, "BEGIN"))
