"""What commands share: options, exit statuses and JSON output."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from jobs.client.results import JobInfo
from jobs.json_lines import one_line

FAILED = 1
WRONG_USE = 2

JobId = Annotated[
    str | None, typer.Argument(metavar="[JOB]", help="Job id or a prefix of it. Default: your newest job.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: BaseModel | list[JobInfo] | dict[str, Any]) -> None:
    """Print a value as one line of JSON."""
    if isinstance(value, BaseModel):
        typer.echo(one_line(value.model_dump_json()))
    elif isinstance(value, list):
        typer.echo(json.dumps([item.model_dump(mode="json") for item in value]))
    else:
        typer.echo(json.dumps(value))
