"""Alembic environment.

`storage.schema` passes a connection in a write transaction; the `alembic` command opens the database of the settings
in the same way.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from storage.models import Base
from storage.session import make_engine, write_connection
from storage.settings import StorageSettings


def run(connection: Connection) -> None:
    """Run the migrations in the connection's transaction. SQLite can roll back DDL as well."""
    context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


def run_offline(url: str) -> None:
    """Print the SQL instead of running it."""
    context.configure(url=url, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    """Migrate the database of the given connection, or that of the settings."""
    given = context.config.attributes.get("connection")
    if given is not None:
        run(given)
        return
    url = StorageSettings().resolved_database_url
    if context.is_offline_mode():
        run_offline(url)
        return
    with write_connection(make_engine(url)) as connection:
        run(connection)


main()
