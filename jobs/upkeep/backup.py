"""Back up the database into one file, beside running services, and restore it.

SQL is all of the service's state: jobs, outputs, files, uploads, keys. SQLite copies itself; PostgreSQL is copied by
its own programs `pg_dump` and `pg_restore`.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import URL, make_url, text

from jobs.errors import SetupError
from jobs.logs import without_secrets
from jobs.schema_check import explain_database_errors, require_schema
from storage import backup, schema
from storage.backup import Contents, NoBackup
from storage.session import Database
from storage.settings import sqlite_file

_POSTGRESQL_MAGIC: Final = b"PGDMP"  # of pg_dump's custom format


@dataclass(frozen=True, slots=True)
class BackedUp:
    """What a backup holds."""

    file: str
    bytes: int
    revision: str
    jobs: int
    open_jobs: int
    files: int
    keys: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restored database holds, and what happens next."""

    revision: str  # of the backup; the database has that of this version now
    jobs: int
    open_jobs: int
    requeued_requests: int  # that were running; they continue from their committed tokens
    overdue_jobs: int  # whose completion window has passed meanwhile


def back_up(url: str, file: Path) -> BackedUp:
    """Copy the database into a new file. Services may run; the copy is of one moment.

    Raise SetupError and the errors of `explain_database_errors`.
    """
    if file.exists():
        raise SetupError(f"{file} exists; name a new file, or remove this one")
    if not file.absolute().parent.is_dir():
        raise SetupError(f"there is no folder {file.absolute().parent}")
    require_schema(url)
    revision = schema.current(url)
    try:
        if (source := sqlite_file(url)) is not None:
            backup.copy_sqlite(source, file)
        else:
            _dump(url, file)
        held = _contents(url)
        return BackedUp(str(file), file.stat().st_size, str(revision), held.jobs, held.open_jobs, held.files, held.keys)
    except (OSError, sqlite3.Error) as error:
        raise SetupError(f"{file} could not be written: {_why(error)}") from error


def restore(url: str, file: Path, *, replace: bool = False) -> Restored:
    """Replace the database by a backup, upgrade its schema, and return its running requests to the queue.

    Raise SetupError, before anything is changed, if a service runs on the database, if it holds jobs, files or keys and
    `replace` is False, and if the file is no backup of this kind of database or of a newer version.
    """
    target = sqlite_file(url)
    revision = _revision(file, url)
    if not schema.is_known(revision):
        raise SetupError(
            f"{file} has revision {revision} of a newer version of bASIC; this version knows revisions up to "
            f"{schema.head()}. Restore it with the newer version"
        )
    with explain_database_errors(url):
        _refuse_to_overwrite(url, replace)
        if target is not None:
            _restore_sqlite(file, target)
        else:
            _restore_postgresql(url, file)
        schema.upgrade(url)
        database = Database.open(url, statement_timeout_s=None)
        try:
            with database.write() as session:
                requeued = backup.release_all(session)
                held, overdue = backup.contents(session), backup.overdue_jobs(session)
        finally:
            database.dispose()
    return Restored(revision, held.jobs, held.open_jobs, requeued, overdue)


def _contents(url: str) -> Contents:
    database = Database.open(url, statement_timeout_s=None)
    try:
        with database.read() as session:
            return backup.contents(session)
    finally:
        database.dispose()


def _refuse_to_overwrite(url: str, replace: bool) -> None:
    """Raise SetupError if the database is in use, newer than this version, or holds something."""
    current = schema.current(url)
    if current is None:
        return
    where = f"the database {without_secrets(url)}"
    if not schema.is_known(current):
        raise SetupError(f"{where} has revision {current} of a newer version of bASIC; restore with that version")
    if current != schema.head():
        raise SetupError(
            f"{where} has revision {current}, and this version needs {schema.head()}; run: basic db upgrade"
        )
    database = Database.open(url, statement_timeout_s=None)
    try:
        with database.read() as session:
            in_use, held = backup.is_in_use(session), backup.contents(session)
    finally:
        database.dispose()
    if in_use:
        raise SetupError(
            f"a service runs on {where}, or was killed less than 30 seconds ago; stop all workers and API servers first"
        )
    if not held.is_empty and not replace:
        raise SetupError(
            f"{where} holds {held.jobs} jobs, {held.files} files and {held.keys} keys, which would be lost; "
            "restore with --replace, or set BASIC_DATABASE_URL to another database"
        )


def _revision(file: Path, url: str) -> str:
    """Return the schema revision of a backup; raise SetupError if it is none, or of another kind of database."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(backup.SQLITE_MAGIC))
    except OSError as error:
        raise SetupError(f"{file} can't be read: {error.strerror}") from error
    is_sqlite, is_dump = start == backup.SQLITE_MAGIC, start.startswith(_POSTGRESQL_MAGIC)
    if not (is_sqlite or is_dump):
        raise SetupError(f"{file} is no backup: `basic db backup` writes SQLite files and archives of pg_dump")
    if is_sqlite != (sqlite_file(url) is not None):
        kinds = ("SQLite", "PostgreSQL") if is_sqlite else ("PostgreSQL", "SQLite")
        raise SetupError(f"{file} is a backup of {kinds[0]}, and the database is {kinds[1]}: set BASIC_DATABASE_URL")
    try:
        return backup.sqlite_revision(file) if is_sqlite else _dumped_revision(file)
    except NoBackup as reason:
        raise SetupError(f"{file} can't be restored: {reason}") from reason


def _restore_sqlite(file: Path, target: Path) -> None:
    try:
        backup.restore_sqlite(file, target)
    except sqlite3.Error as error:
        raise SetupError(f"{target} could not be written: {_why(error)}; stop all processes that use it") from error


def _dump(url: str, file: Path) -> None:
    """Run pg_dump; it reads one snapshot. A dump that fails leaves no file."""
    tool = _tool("pg_dump")
    _refuse_older_tool(url, tool)
    part = file.with_name(f".{file.name}.part")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600))
        _run([tool, "--format=custom", "--no-owner", "--no-privileges", f"--file={part}"], url)
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


def _restore_postgresql(url: str, file: Path) -> None:
    tool = _tool("pg_restore")
    _refuse_older_tool(url, tool)
    backup.drop_tables(url)
    _run([tool, "--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error", str(file)], url)


def _dumped_revision(file: Path) -> str:
    command = [_tool("pg_restore"), "--file=-", "--data-only", "--table=alembic_version", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoBackup(_last_line(done.stderr))
    found = re.search(r"^COPY .*alembic_version.*;\n(\S+)$", done.stdout, re.MULTILINE)
    if found is None or found[1] == "\\.":
        raise NoBackup("it has no schema of bASIC")
    return found[1]


def _tool(name: str) -> str:
    """Return the path of a program of PostgreSQL; raise SetupError with how to get it."""
    found = shutil.which(name)
    if found is None:
        raise SetupError(
            f"{name} is not installed: it comes with the client programs of PostgreSQL (Debian, Ubuntu: apt install "
            "postgresql-client), and must be as new as the server"
        )
    return found


def _refuse_older_tool(url: str, tool: str) -> None:
    """Raise SetupError if the server is of a newer major version than pg_dump or pg_restore: they would fail later."""
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"(\d+)[\d.]*", said)
    database = Database.open(url)
    try:
        with database.connect() as connection:
            server = int(str(connection.scalar(text("SHOW server_version_num")))) // 10_000
    finally:
        database.dispose()
    if version is None or int(version[1]) < server:
        raise SetupError(
            f"{tool} is of version {version[1] if version else '?'} and the server of version {server}; "
            f"install the client programs of PostgreSQL {server} or newer"
        )


def _run(command: Sequence[str], url: str) -> None:
    """Run a program of PostgreSQL on the database. The password goes into its environment: all users see arguments."""
    parsed = make_url(url)
    environment = {**os.environ, **({"PGPASSWORD": str(parsed.password)} if parsed.password else {})}
    command = [*command, f"--dbname={_for_libpq(parsed)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"{Path(command[0]).name} failed: {without_secrets(_last_line(done.stderr))}")


def _for_libpq(url: URL) -> str:
    """Return a URL as libpq reads it, without the driver's name and the password."""
    return url._replace(drivername="postgresql", password=None).render_as_string()


def _last_line(text_: str) -> str:
    lines = (
        [line for line in text_.splitlines() if "error:" in line] or text_.strip().splitlines() or ["no reason given"]
    )
    return lines[0].strip()


def _why(error: OSError | sqlite3.Error) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
