"""`basic jobs`: list and find jobs."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from jobs.cli import lookup
from jobs.cli.lookup import NO_JOB
from jobs.cli.options import AsJson, print_json
from jobs.cli.render import jobs_table, make_console
from jobs.messages import JobStatus


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="Maximum number of jobs.")] = 20,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY[=VALUE]", help="Only jobs with this label; may be repeated: with all of them."),
    ] = None,
    status: Annotated[
        list[JobStatus] | None, typer.Option(help="Only jobs with this status; may be repeated: with one of them.")
    ] = None,
    search: Annotated[
        str, typer.Option(metavar="TEXT", help="Only jobs with this text in the name or a label, in any case.")
    ] = "",
    name: Annotated[str | None, typer.Option(help="Only jobs with this name.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first. A narrow window shows id prefixes, which all commands accept.

    Example: basic jobs --limit 5

    Example: basic jobs --label team=search --status failed --status paused

    Example: basic jobs --search nightly
    """
    labels = dict(_read_label(text) for text in label or ())
    filtered = bool(labels or status or search or name or model)
    with lookup.connect() as client:
        listed = client.jobs(limit, labels=labels, status=status or (), search=search, name=name, model=model)
        if as_json:
            print_json(listed)
        elif listed:
            console = make_console()
            console.print(jobs_table(listed, console.width, time.time()))
        else:
            typer.echo("No job meets all of these conditions." if filtered else NO_JOB)


def _read_label(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    if not key:
        raise typer.BadParameter(f"{text!r} is not a label; write KEY=VALUE or KEY", param_hint="--label")
    return key, value if equals else None
