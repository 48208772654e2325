"""What commands share: options, exit statuses and JSON output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel

from jobs.client.request_body import DataFile, PromptFile
from jobs.client.results import JobInfo
from jobs.json_lines import one_line
from jobs.messages import Endpoint, Priority
from jobs.tables.columns import Columns
from jobs.tables.locations import is_url

FAILED = 1
WRONG_USE = 2

JobId = Annotated[
    str | None, typer.Argument(metavar="[JOB]", help="Job id or a prefix of it. Default: your newest job.")
]
Name = Annotated[str | None, typer.Option(help="Name of the job.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label of the job; may be repeated.")
]
PriorityClass = Annotated[
    Priority | None, typer.Option(help="Waiting jobs of a higher class run first. Default: normal.")
]
MaxConcurrent = Annotated[
    int | None, typer.Option(min=1, help="Maximum number of its requests that run at once. Default: no limit.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SourceFile = Annotated[
    str, typer.Argument(metavar="FILE", help="Lines of JSON or text, or a table: a path, a URL, or - for stdin.")
]
PromptColumn = Annotated[str | None, typer.Option(help="Column of a table with the prompts.")]
MessagesColumn = Annotated[str | None, typer.Option(help="Column with lists of messages.")]
Template = Annotated[str | None, typer.Option(help="Prompt with {column} in it, or a file of Jinja (.jinja, .j2).")]
IdColumn = Annotated[str | None, typer.Option(help="Column with the custom ids.")]
Keep = Annotated[list[str] | None, typer.Option(help="Columns that the outputs return, with commas between them.")]
Model = Annotated[str | None, typer.Option(help="Target model.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Maximum tokens of a completion.")]
Temperature = Annotated[
    float,
    typer.Option(min=0, max=2, help="Temperature of lines that set none. 0 is greedy; the API's default is 1."),
]
Seed = Annotated[
    str | None,
    typer.Option(
        metavar="INTEGER|identity",
        help="Random seed: the same seed gives the same text; identity: one that follows from each request.",
    ),
]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache",
        help="Whether requests that equal earlier ones get copies of their answers. Default: as BASIC_CACHE says.",
    ),
]
SchemaFile = Annotated[
    Path | None,
    typer.Option(dir_okay=False, exists=True, help="JSON schema of the answers of lines that set none."),
]
OfEndpoint = Annotated[
    Endpoint | None, typer.Option(help="Endpoint of all requests. Default: the one that the lines name.")
]
IdempotencyKey = Annotated[str | None, typer.Option(help="Submitting again with the same key creates no second job.")]
BudgetTokens = Annotated[
    int | None, typer.Option(min=1, help="Prompt and completion tokens after which the job pauses.")
]
BudgetSeconds = Annotated[float | None, typer.Option(min=0.001, help="Seconds of running after which the job pauses.")]


def budget_of(tokens: int | None, seconds: float | None) -> dict[str, float | None] | None:
    """Return the budget that the options give; None for none."""
    given = {"tokens": tokens, "seconds": seconds}
    return {name: value for name, value in given.items() if value is not None} or None


def columns_of(
    prompt: str | None, messages: str | None, template: str | None, id: str | None, keep: Iterable[str] | None
) -> Columns:
    """Return the columns that the options name."""
    kept = tuple(name.strip() for names in keep or () for name in names.split(",") if name.strip())
    return Columns(prompt=prompt, messages=messages, template=template, id=id, keep=kept)


def source_of(file: str) -> PromptFile | DataFile:
    """Return what FILE names; refuse a path that can't be read."""
    if file == "-":
        return PromptFile(sys.stdin.buffer.read(), name="Standard input")
    if not is_url(file) and not Path(file).is_dir():
        try:
            Path(file).open("rb").close()
        except OSError as exc:
            raise typer.BadParameter(f"{file} can't be read: {exc.strerror}", param_hint="FILE") from exc
    return DataFile(file)


def read_labels(given: list[str] | None) -> dict[str, str]:
    """Return labels from options such as team=search; refuse other texts."""
    labels: dict[str, str] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{text!r} is not a label; write KEY=VALUE", param_hint="--label")
        if labels.setdefault(key, value) != value:
            raise typer.BadParameter(f"{key} has two values; a job has one for each key", param_hint="--label")
    return labels


def read_seed(given: str | None) -> int | Literal["identity"] | None:
    """Return a seed from its option: a whole number, or the word."""
    if given is None:
        return None
    if given == "identity":
        return "identity"
    try:
        return int(given)
    except ValueError as exc:
        raise typer.BadParameter(f"{given!r} is neither a whole number nor identity", param_hint="--seed") from exc


def print_json(value: BaseModel | list[JobInfo] | dict[str, Any]) -> None:
    """Print a value as one line of JSON."""
    if isinstance(value, BaseModel):
        typer.echo(one_line(value.model_dump_json()))
    elif isinstance(value, list):
        typer.echo(json.dumps([item.model_dump(mode="json") for item in value]))
    else:
        typer.echo(json.dumps(value))
