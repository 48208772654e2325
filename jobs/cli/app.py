"""The `basic` command: all its subcommands, and errors as one sentence with an exit status.

Packages that only some commands need are imported inside these commands. Other packages add commands through the entry
points `basic.commands`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Annotated

import typer
from pydantic import ValidationError

import jobs
from jobs.cli.database import database_commands
from jobs.cli.estimate import estimate
from jobs.cli.extras import add_placeholders, extra_of, is_own_module, not_installed
from jobs.cli.fields import fields
from jobs.cli.jobs import cancel, follow, results, retry, rm, status, submit
from jobs.cli.keys import key_commands
from jobs.cli.manage.changes import edit, pause, resume
from jobs.cli.manage.listing import list_jobs
from jobs.cli.options import FAILED, WRONG_USE
from jobs.cli.proof.verify import verify
from jobs.cli.service import api, doctor, down, up
from jobs.cli.settings import settings
from jobs.cli.stats import report, stats
from jobs.cli.webhooks.commands import webhook_commands
from jobs.errors import BasicError, ChildRefused, UnknownSetting
from jobs.processes import BAD_SETTINGS_STATUS
from jobs.settings import refuse_unknown_settings, settings_sentence

app = typer.Typer(
    name="basic",
    help="Asynchronous batch generation with adaptive draft trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: Sequence[Callable[..., None]] = (
    *(submit, estimate, follow, status, results, retry, cancel, rm),
    *(list_jobs, edit, pause, resume),
    *(stats, report, verify, up, down, api, doctor, settings, fields),
)
for command in COMMANDS:
    app.command("jobs" if command is list_jobs else None)(command)
app.add_typer(database_commands, name="db")
app.add_typer(key_commands, name="keys")
app.add_typer(webhook_commands, name="webhooks")


def main() -> None:
    """Run the command line. Print an error as one sentence on standard error and exit with its status."""
    try:
        refuse_unknown_settings()
        plug_in_commands(app)
        app()
    except (UnknownSetting, ValidationError) as exc:
        _fail(str(exc) if isinstance(exc, UnknownSetting) else settings_sentence(exc), WRONG_USE)
    except ChildRefused as exc:
        _fail(str(exc), BAD_SETTINGS_STATUS)
    except BasicError as exc:
        _fail(str(exc), FAILED)
    except ModuleNotFoundError as exc:
        if is_own_module(exc):
            raise  # a bug, not a missing extra
        _fail(str(not_installed(extra_of(sys.argv[1:2], exc), exc)), FAILED)


def plug_in_commands(to: typer.Typer) -> None:
    """Add the commands of other packages, or placeholders that name the extra to install."""
    for entry in entry_points(group="basic.commands"):
        try:
            to.add_typer(entry.load())
        except ModuleNotFoundError as exc:
            add_placeholders(to, entry, exc)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"basic-batch {jobs.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _fail(sentence: str, status: int) -> None:
    typer.echo(f"basic: {sentence}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
