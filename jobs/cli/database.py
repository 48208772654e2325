"""`basic db`: create, upgrade, prune, back up and restore the database."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.extras import needs
from jobs.cli.options import AsJson
from jobs.client.durations import parse_duration_s
from jobs.settings import JobsSettings

database_commands = typer.Typer(help="Upgrade, prune, back up and restore the SQL database.", no_args_is_help=True)


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


@database_commands.command()
def backup(
    file: Annotated[Path, typer.Argument(help="New file, which only you can read.", dir_okay=False)],
    as_json: AsJson = False,
) -> None:
    """Copy the database into a file, beside running services: jobs, outputs, files and keys, as they are at one moment.

    PostgreSQL needs its program pg_dump. Prompt batches that were pushed and not stored yet are in Redis only.

    Example: basic db backup basic-2026-11-30.backup
    """
    with needs("api"):
        from jobs.upkeep.backup import back_up
    done = back_up(JobsSettings().resolved_database_url, file)
    held = f"{done.jobs:,} jobs ({done.open_jobs:,} open), {done.files:,} files and {done.keys:,} keys"
    said = f"Wrote {held}, revision {done.revision}, {done.bytes / 1e6:.1f} MB, to {done.file}"
    typer.echo(json.dumps(asdict(done)) if as_json else said)


@database_commands.command()
def restore(
    file: Annotated[Path, typer.Argument(help="File that `basic db backup` wrote.", dir_okay=False)],
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete the jobs, files and keys that the database holds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replace the database by a backup. Stop all workers and API servers first; open jobs continue when they start.

    PostgreSQL needs its program pg_restore.

    Example: basic db restore basic-2026-11-30.backup
    """
    with needs("api"):
        from jobs.upkeep.backup import restore as restore_backup
    done = restore_backup(JobsSettings().resolved_database_url, file, replace=replace)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
        return
    typer.echo(f"Restored {done.jobs:,} jobs; {done.open_jobs:,} are open and continue when workers start")
    if done.overdue_jobs:
        typer.echo(f"The completion window of {done.overdue_jobs:,} open jobs has passed: they end as expired")
