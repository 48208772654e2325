"""`basic db`: create, upgrade and prune the database."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs.cli.extras import needs
from jobs.cli.options import AsJson
from jobs.client.durations import parse_duration_s
from jobs.settings import JobsSettings

database_commands = typer.Typer(help="Upgrade and prune the SQL database.", no_args_is_help=True)


@database_commands.command()
def upgrade() -> None:
    """Upgrade the database to the schema of this version; create it if there is none.

    Decoding steps of earlier versions are packed in small transactions, beside running services. If that is
    interrupted, run it again: it continues.

    Example: basic db upgrade
    """
    with needs("api"):
        from jobs.schema_check import upgrade_schema
    upgrade_schema(JobsSettings().resolved_database_url, on_packed=_say_packed)
    typer.echo("The database is up to date")


def _say_packed(packed: int, total: int) -> None:
    typer.echo(f"Packed {packed:,} of {total:,} decoding steps", err=True)


@database_commands.command()
def prune(
    steps_older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Age of the jobs, since they ended: a number and m, h or d, such as 30d.")
    ],
    as_json: AsJson = False,
) -> None:
    """Delete the decoding steps of jobs that ended longer ago. Jobs and outputs are kept.

    Example: basic db prune --steps-older-than 30d
    """
    with needs("api"):
        from jobs.schema_check import explain_database_errors, require_schema
        from storage.prune import prune_steps
        from storage.session import Database
    try:
        age_s = parse_duration_s(steps_older_than, zero=True)
    except ValueError as exc:
        raise typer.BadParameter(f"{exc}, such as 30d", param_hint="--steps-older-than") from exc
    url = JobsSettings().resolved_database_url
    require_schema(url)
    with explain_database_errors(url):
        database = Database.open(url, statement_timeout_s=None)
        deleted = sum(prune_steps(database, age_s))
    database.dispose()
    typer.echo(json.dumps({"deleted_steps": deleted}) if as_json else f"Deleted {deleted:,} steps")
