"""The guard before every start and upgrade: a database whose schema this version can't work with.

worker.tasks, jobs.api, jobs.ingest, jobs.cli -> [schema_guard] -> storage.schema.  Migrations only add, so a database
that a newer version has upgraded serves this one too, and old and new processes run side by side during an upgrade.
"""

from __future__ import annotations

import logging

from jobs.errors import SetupError
from storage import schema

log = logging.getLogger(__name__)


def driver_missing(exc: ModuleNotFoundError) -> str:
    """Return what to say where a database's driver is not installed."""
    return f"this database needs {exc.name}; install it with: pip install 'basic-batch[postgres]'"


def upgrade_schema(database_url: str) -> None:
    """Bring the database to the schema of this version; raise SetupError if a newer one has upgraded it."""
    current = schema.current(database_url)
    if current is not None and not schema.is_known(current):
        raise SetupError(
            f"the database is at revision {current}, of a newer version of bASIC; this one knows up to {schema.head()} "
            "and changes nothing. Upgrade with the newer version, or set BASIC_DATABASE_URL to another database"
        )
    schema.upgrade(database_url)


def require_schema(database_url: str) -> None:
    """Raise SetupError, with what to do, if the database is older than this version."""
    try:
        current = schema.current(database_url)
    except ModuleNotFoundError as exc:
        raise SetupError(driver_missing(exc)) from exc
    if current == schema.head():
        return
    if current is None:
        raise SetupError("the database has no schema yet; make it with: basic db upgrade")
    if schema.is_known(current):
        raise SetupError(
            f"the database is at revision {current}, and this version needs {schema.head()}; run: basic db upgrade"
        )
    log.warning(
        "The database is at revision %s, of a newer version of bASIC; this one goes on beside it",
        current,
        extra={"action": "newer_schema"},
    )
