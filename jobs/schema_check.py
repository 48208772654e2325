"""The guard before every start and upgrade: a database that can't be reached, or has a schema not to work with.

Migrations only add, so a database that a newer version has upgraded serves this one too, and old and new processes run
side by side during an upgrade.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from alembic.util import CommandError
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from jobs.errors import BasicError, DatabaseUnavailable, SetupError
from jobs.logs import without_secrets
from jobs.processes import BAD_SETTINGS_STATUS, RESTART_STATUS
from storage import schema
from storage.session import DATABASE_UNAVAILABLE, unavailable_reason

log = logging.getLogger(__name__)


_FORMS = "postgresql://USER:PASSWORD@HOST/DATABASE, or sqlite:////PATH/TO/FILE"


@contextmanager
def database_in_words(url: str) -> Iterator[None]:
    """Turn what a database, its driver or its URL refuses into one sentence that says which, why and what to do.

    Raise DatabaseUnavailable where a later try may work, and SetupError where it can't. No sentence has a password.
    """
    where = f"the database {without_secrets(url)}"
    try:
        yield
    except ModuleNotFoundError as exc:
        raise SetupError(_driver_missing(exc)) from exc
    except CommandError as exc:
        raise SetupError(
            f"{where} was made by another version of bASIC ({exc}); "
            "use that version, or set BASIC_DATABASE_URL to another database"
        ) from exc
    except ArgumentError as exc:
        raise SetupError(f"BASIC_DATABASE_URL can't be used: {exc}; write {_FORMS}") from exc
    except DATABASE_UNAVAILABLE as exc:
        raise DatabaseUnavailable(
            f"{where} can't be used: {_why(exc)}; "
            "check that it can be reached and written, or set BASIC_DATABASE_URL to another"
        ) from exc
    except (SQLAlchemyError, OSError) as exc:
        raise SetupError(f"{where} can't be used: {_why(exc)}; set BASIC_DATABASE_URL to another") from exc


def exit_status(error: BasicError) -> int:
    """Return how a process ends that can't start: whether another start may work."""
    return RESTART_STATUS if isinstance(error, DatabaseUnavailable) else BAD_SETTINGS_STATUS


def _why(error: Exception) -> str:
    return without_secrets(unavailable_reason(error))


def _driver_missing(exc: ModuleNotFoundError) -> str:
    if exc.name == "psycopg":
        return "PostgreSQL needs psycopg; install it with: pip install 'basic-batch[postgres]'"
    return f"the driver {exc.name} is not installed; write the database's URL as {_FORMS}"


def upgrade_schema(database_url: str) -> None:
    """Bring the database to the schema of this version; raise SetupError if a newer one has upgraded it.

    What else is wrong with the database is raised as `database_in_words` does.
    """
    with database_in_words(database_url):
        current = schema.current(database_url)
        if current is not None and not schema.is_known(current):
            raise SetupError(
                f"the database is at revision {current}, of a newer version of bASIC; this one knows up to "
                f"{schema.head()} and changes nothing. Upgrade with the newer version, or set BASIC_DATABASE_URL to "
                "another database"
            )
        schema.upgrade(database_url)


def require_schema(database_url: str) -> None:
    """Raise SetupError, with what to do, if the database is older than this version, or as `database_in_words` does."""
    with database_in_words(database_url):
        current = schema.current(database_url)
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
