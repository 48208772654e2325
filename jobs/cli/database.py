"""`basic db`: create, upgrade, prune, back up and restore the database."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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


def _age(what: str) -> Any:
    return typer.Option(metavar="AGE", help=f"Delete {what} older than this: a number and m, h or d, such as 30d.")


@database_commands.command()
def prune(
    prompts_older_than: Annotated[str | None, _age("prompts of jobs that ended")] = None,
    outputs_older_than: Annotated[str | None, _age("outputs of jobs that ended")] = None,
    steps_older_than: Annotated[str | None, _age("decoding steps of jobs that ended")] = None,
    files_older_than: Annotated[str | None, _age("files")] = None,
    as_json: AsJson = False,
) -> None:
    """Delete old prompts, outputs, steps and files. The jobs and their counts are kept.

    Without options, apply BASIC_PROMPT_DAYS, BASIC_OUTPUT_DAYS, BASIC_STEP_DAYS and the ages of keys now, as the API
    server does by itself. With options, exactly these ages hold for all keys. Jobs that were deleted are erased too.

    Example: basic db prune --steps-older-than 30d
    """
    given = {
        "prompts": prompts_older_than,
        "outputs": outputs_older_than,
        "steps": steps_older_than,
        "files": files_older_than,
    }
    ages_s = {name: _age_s(age, name) for name, age in given.items() if age is not None}
    settings = JobsSettings()
    with needs("api"):
        from jobs.schema_check import explain_database_errors, require_schema
        from jobs.upkeep.pruner import ages_of, prune_all
        from storage.prune import Ages
        from storage.session import Database
    url = settings.resolved_database_url
    require_schema(url)
    ages = Ages(**{f"{name}_s": age_s for name, age_s in ages_s.items()}, by_key=False) if ages_s else ages_of(settings)
    with explain_database_errors(url):
        database = Database.open(url, statement_timeout_s=None)
        deleted = prune_all(database, ages)
    database.dispose()
    shown = {name: count for name, count in deleted.items() if count or name in ages_s}
    if as_json:
        typer.echo(json.dumps({f"deleted_{name}": count for name, count in shown.items()}))
    else:
        said = ", ".join(f"{count:,} {name}" for name, count in shown.items())
        typer.echo(f"Deleted {said}" if said else "Nothing was old enough")


def _age_s(age: str, name: str) -> float:
    try:
        return parse_duration_s(age, zero=True)
    except ValueError as exc:
        raise typer.BadParameter(f"{exc}, such as 30d", param_hint=f"--{name}-older-than") from exc


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
