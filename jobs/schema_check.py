"""Check the database's schema before a process starts, and upgrade it.

Migrations only add, so a process also runs on a schema of a newer version. Old and new processes can therefore run side
by side during an upgrade.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
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
def explain_database_errors(url: str) -> Iterator[None]:
    """Translate errors of the database, its driver or its URL into one sentence: which database, why, and what to do.

    Raise DatabaseUnavailable if a later attempt may work, otherwise SetupError. Messages contain no password.
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
    """Return the exit status of a process that can't start: it tells whether a restart may help."""
    return RESTART_STATUS if isinstance(error, DatabaseUnavailable) else BAD_SETTINGS_STATUS


def _why(error: Exception) -> str:
    return without_secrets(unavailable_reason(error))


def _driver_missing(exc: ModuleNotFoundError) -> str:
    if exc.name == "psycopg":
        return "PostgreSQL needs psycopg; install it with: pip install 'basic-batch[postgres]'"
    return f"the driver {exc.name} is not installed; write the database's URL as {_FORMS}"


def upgrade_schema(database_url: str, on_packed: Callable[[int, int], None] | None = None) -> None:
    """Upgrade the database to the schema of this version; `on_packed`: see `storage.schema.upgrade`.

    Raise SetupError if a newer version has upgraded it, and the errors of `explain_database_errors`.
    """
    with explain_database_errors(database_url):
        current = schema.current(database_url)
        if current is not None and not schema.is_known(current):
            raise SetupError(
                f"the database has revision {current} of a newer version of bASIC; this version knows revisions up to "
                f"{schema.head()} and changes nothing. Upgrade with the newer version, or set BASIC_DATABASE_URL to "
                "another database"
            )
        schema.upgrade(database_url, on_packed=on_packed)


def require_schema(database_url: str) -> None:
    """Raise SetupError, with the command to run, if the schema is older than this version needs.

    Also raise the errors of `explain_database_errors`.
    """
    with explain_database_errors(database_url):
        current = schema.current(database_url)
    if current == schema.head():
        return
    if current is None:
        raise SetupError("the database has no schema yet; create it with: basic db upgrade")
    if schema.is_known(current):
        raise SetupError(
            f"the database has revision {current}, and this version needs {schema.head()}; run: basic db upgrade"
        )
    log.warning(
        "The database has revision %s of a newer version of bASIC; this version can use it",
        current,
        extra={"action": "newer_schema"},
    )
