"""Schema version: upgrade and downgrade a database, and read its revision.

Alembic reads the migration scripts as files: a checkout has them in migrations/, an installation in
basic_batch/migrations, because another distribution may have a top-level package `migrations`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from storage.session import LONG_STATEMENT_TIMEOUT_S, make_engine, write_connection
from storage.steps.conversion import pack_steps, unpacked_steps
from storage.steps.view import UNPACKED

_UPGRADE_LOCK: Final = 0x62415349  # advisory lock id of bASIC migrations
_PARENT: Final = Path(__file__).resolve().parent.parent
_INSTALLED: Final = _PARENT / "basic_batch" / "migrations"
_SCRIPTS: Final = _INSTALLED if _INSTALLED.is_dir() else _PARENT / "migrations"


def upgrade(url: str, revision: str = "head", on_packed: Callable[[int, int], None] | None = None) -> None:
    """Upgrade a database to a revision in one transaction; a missing SQLite file is created.

    Then pack the decoding steps of earlier versions in small transactions; after each, call `on_packed` with the
    number of packed steps and of all. If that is interrupted, the next upgrade continues, and the view `decode_steps`
    shows all steps meanwhile.
    Concurrent upgrades are serialised, and the second one finds nothing to do.
    """
    engine = make_engine(url)
    try:
        with write_connection(engine) as connection:
            if connection.dialect.name == "postgresql":  # on SQLite the transaction itself is the lock
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
            command.upgrade(_config(connection), revision)
        total, packed = unpacked_steps(engine), 0
        for steps in pack_steps(engine):
            packed += steps
            if on_packed is not None:
                on_packed(packed, total)
    finally:
        engine.dispose()


def downgrade(url: str, revision: str) -> None:
    """Downgrade a database to an earlier revision (`base`: no tables). Data of later revisions is deleted."""
    engine = make_engine(url)
    try:
        with write_connection(engine) as connection:
            command.downgrade(_config(connection), revision)
    finally:
        engine.dispose()


def current(url: str) -> str | None:
    """Return the revision of a database; None if it has no schema of bASIC."""
    engine = make_engine(url, LONG_STATEMENT_TIMEOUT_S)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def has_unpacked_steps(url: str) -> bool:
    """Return whether an upgrade was interrupted before it had packed the decoding steps of earlier versions."""
    engine = make_engine(url, LONG_STATEMENT_TIMEOUT_S)
    try:
        with engine.connect() as connection:
            return inspect(connection).has_table(UNPACKED)
    finally:
        engine.dispose()


def is_known(revision: str) -> bool:
    """Return whether this version knows a revision. Those of newer versions are unknown."""
    return revision in {script.revision for script in _scripts().walk_revisions()}


def head() -> str:
    """Return the newest revision, which this version of bASIC requires."""
    revision = _scripts().get_current_head()
    assert revision is not None, f"no migrations in {_SCRIPTS}"
    return revision


@cache
def _scripts() -> ScriptDirectory:
    """Read the migration scripts once: it takes 15 ms."""
    return ScriptDirectory.from_config(_config())


def _config(connection: Connection | None = None) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config
