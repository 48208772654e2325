"""Before a job runs: what it would become (`basic submit --dry-run`), and what it will take (`basic estimate`)."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated

import typer

from jobs.cli import lookup
from jobs.cli.lookup import find_job
from jobs.cli.options import (
    FAILED,
    AsJson,
    BudgetSeconds,
    BudgetTokens,
    Cache,
    IdColumn,
    Keep,
    MaxTokens,
    MessagesColumn,
    Model,
    OfEndpoint,
    PromptColumn,
    SchemaFile,
    Seed,
    Temperature,
    Template,
    budget_of,
    columns_of,
    print_json,
    read_seed,
    source_of,
)
from jobs.client.async_client import CountPrompts
from jobs.client.durations import duration_text
from jobs.client.response_format import schema_file
from jobs.client.results import JobCheck, JobEstimate, Prediction
from jobs.control_characters import safe
from jobs.messages import TOOLS_TEMPERATURE

_SHOWN = 10  # refused requests that are printed
_NO_POWER = (
    "  energy             not measurable here: no NVML and no RAPL that the worker can read, or under 5 s of load; "
    "BASIC_POWER_W of the worker says its watts"
)


def estimate(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="As of `basic submit`: lines, a table, a URL, or - for stdin."),
    ] = None,
    job: Annotated[
        str | None, typer.Option("--job", help="In place of FILE: a job that was submitted with a pilot.")
    ] = None,
    pilot: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that run first. Default: a hundredth, or one batch of the workers."),
    ] = None,
    pilot_seed: Annotated[int, typer.Option(help="Seed by which the pilot is drawn.")] = 0,
    run: Annotated[bool, typer.Option("--run", help="Run the rest after the estimate, without asking.")] = False,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    template: Template = None,
    id_column: IdColumn = None,
    keep: Keep = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = TOOLS_TEMPERATURE,
    seed: Seed = None,
    cache: Cache = None,
    schema: SchemaFile = None,
    endpoint: OfEndpoint = None,
    budget_tokens: BudgetTokens = None,
    budget_seconds: BudgetSeconds = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job, run a pilot of its requests, and predict what the others take. They wait until you resume it.

    The answers of the pilot are the job's own: nothing runs twice.

    Example: basic estimate examples/prompts.jsonl --max-tokens 128

    Example: basic estimate reviews.parquet --template "Translate: {text}" --run
    """
    if (file is None) == (job is None):
        raise typer.BadParameter("Give FILE, or --job for one that was submitted.")
    with lookup.connect() as client:
        if file is None:
            found = find_job(client, job)
        else:
            found = client.submit(
                source_of(file),
                model=model,
                endpoint=endpoint,
                columns=columns_of(prompt_column, messages_column, template, id_column, keep),
                pilot={"seed": pilot_seed} if pilot is None else {"requests": pilot, "seed": pilot_seed},
                budget=budget_of(budget_tokens, budget_seconds),
                max_tokens=max_tokens,
                temperature=temperature,
                seed=read_seed(seed),
                cache=cache,
                response_format=None if schema is None else schema_file(schema),
            )
            typer.echo(f"Running a pilot of job {found.id}; if you leave: basic estimate --job {found.id}", err=True)
        predicted = found.estimate()
        if run:
            found.resume()
        print_json(predicted) if as_json else typer.echo("\n".join(_estimate_lines(predicted, run)))


def _estimate_lines(predicted: JobEstimate, running: bool) -> list[str]:
    pilot, rest = predicted.pilot, predicted.rest
    lines = [
        f"Pilot: {pilot.completed:,} of {pilot.requests:,} requests completed, {pilot.prompt_tokens:,} prompt and "
        f"{pilot.completion_tokens:,} completion tokens",
    ]
    if not rest.requests:
        return [*lines, "The pilot was the whole job: nothing is left to run."]
    lines += [
        f"The other {rest.requests:,} requests, {predicted.batch_sequences} texts at once on each of "
        f"{predicted.workers} workers, with 90 % intervals:",
        *(
            [f"  cached             {rest.requests_cached:,} requests, in none of these"]
            if rest.requests_cached
            else []
        ),
        f"  prompt tokens      {_number(rest.prompt_tokens)}",
        f"  completion tokens  {_number(rest.completion_tokens)}",
        f"  time               {'unknown: no step was measured' if rest.seconds is None else _time(rest.seconds)}",
    ]
    if rest.joules is not None:
        power = f"at {predicted.power_w:.0f} W a worker, {predicted.power_source}"
        lines.append(f"  energy             {_number(rest.joules, 3600, ' Wh')}  ({power})")
    elif predicted.power_w is None:
        lines.append(_NO_POWER)
    if running:
        return [*lines, f"The rest is running. Follow it: basic follow {predicted.job_id}"]
    job = predicted.job_id
    return [*lines, f"The rest waits. Run it: basic resume {job}    Drop it: basic cancel {job}"]


def _number(predicted: Prediction, unit: float = 1.0, name: str = "") -> str:
    digits = 0 if unit == 1.0 else 1
    middle, low, high = (f"{value / unit:,.{digits}f}" for value in (predicted.estimate, predicted.low, predicted.high))
    return f"{middle}{name}  ({low} to {high})"


def _time(predicted: Prediction) -> str:
    middle, low, high = map(duration_text, (predicted.estimate, predicted.low, predicted.high))
    return f"{middle}  ({low} to {high})"


def prompt_counter() -> CountPrompts | None:
    """Return the counter of an installed worker; None if there is none, or its packages are missing."""
    for entry in entry_points(group="basic.prompt_counter"):
        try:
            counter: CountPrompts = entry.load()
        except ModuleNotFoundError:
            continue
        return counter
    return None


def report_check(check: JobCheck, as_json: bool) -> int:
    """Print a check and return the exit status: FAILED if anything would be refused."""
    print_json(check) if as_json else typer.echo("\n".join(_lines(check)))
    return 0 if check.passes else FAILED


def _lines(check: JobCheck) -> list[str]:
    counts = check.request_counts
    how = "counted" if check.prompt_tokens_source == "tokenizer" else "estimated: a token for each four bytes"
    unlimited = check.requests_without_max_tokens
    bound = f"; {unlimited:,} requests set no max_tokens, and only the context bounds them" if unlimited else ""
    lines = [
        f"Model: {safe(check.model)}    Endpoint: {check.endpoint}",
        f"Requests: {counts.total:,}, of which {counts.refused:,} would be refused",
        f"Prompt tokens: {check.prompt_tokens:,} ({how})",
        f"Output tokens: at most {check.max_output_tokens:,}{bound}",
    ]
    lines += [f"Refused: {safe(refused.message)}" for refused in check.refused[:_SHOWN]]
    if counts.refused > _SHOWN:
        lines.append(f"{counts.refused - _SHOWN:,} more would be refused; --json lists up to a hundred")
    if check.limit is not None:
        lines.append(f"The job would be refused now: {safe(check.limit)}")
    lines.append("Nothing was submitted.")
    return lines
