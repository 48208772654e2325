"""`basic edit`, `pause` and `resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli import lookup
from jobs.cli.lookup import find_job
from jobs.cli.options import (
    AsJson,
    BudgetSeconds,
    BudgetTokens,
    Labels,
    PriorityClass,
    budget_of,
    print_json,
    read_labels,
)
from jobs.client.outcome import job_status_text
from jobs.client.parameters import JobChanges
from jobs.client.results import JobInfo

_Job = Annotated[str, typer.Argument(help="Job id or a prefix of it.")]


def edit(
    job: _Job,
    name: Annotated[str | None, typer.Option(help="New name; an empty text removes it.")] = None,
    label: Labels = None,
    remove_label: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Remove this label; may be repeated.")
    ] = None,
    priority: PriorityClass = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=0, help="Maximum number of its requests that run at once; 0: no limit.")
    ] = None,
    budget_tokens: BudgetTokens = None,
    budget_seconds: BudgetSeconds = None,
    as_json: AsJson = False,
) -> None:
    """Rename or relabel a job, or change its priority, concurrency limit or budget. What no option names stays.

    Example: basic edit batch_0123456789abcdef --name "nightly run" --label team=search --remove-label draft

    Example: basic edit batch_0123 --priority high --max-concurrent 0
    """
    changes: JobChanges = {}
    labels: dict[str, str | None] = {**dict.fromkeys(remove_label or ()), **read_labels(label)}
    if name is not None:
        changes["name"] = name or None
    if labels:
        changes["labels"] = labels
    if priority is not None:
        changes["priority"] = priority
    if max_concurrent is not None:
        changes["max_concurrent"] = max_concurrent or None
    budget = budget_of(budget_tokens, budget_seconds)
    if budget is not None:
        changes["budget"] = budget
    if not changes:
        raise typer.BadParameter("Give an option that says what to change: basic edit --help lists them")
    with lookup.connect() as client:
        info = find_job(client, job).change(**changes)
        print_json(info) if as_json else typer.echo(f"Changed job {info.id}")


def pause(job: _Job, as_json: AsJson = False) -> None:
    """Pause a job. Its running requests keep their text so far; its completion window does not stop.

    Example: basic pause batch_0123456789abcdef
    """
    with lookup.connect() as client:
        info = find_job(client, job).pause()
        _report(info, as_json, f"Resume it with: basic resume {info.id}")


def resume(
    job: _Job, budget_tokens: BudgetTokens = None, budget_seconds: BudgetSeconds = None, as_json: AsJson = False
) -> None:
    """Resume a paused job, with the same texts as without the pause. One that has spent its budget needs a higher one.

    Example: basic resume batch_0123456789abcdef

    Example: basic resume batch_0123 --budget-tokens 2000000
    """
    budget = budget_of(budget_tokens, budget_seconds)
    with lookup.connect() as client:
        found = find_job(client, job)
        if budget is not None:
            found.change(budget=budget)
        info = found.resume()
        _report(info, as_json, f"Follow it with: basic follow {info.id}")


def _report(info: JobInfo, as_json: bool, advice: str) -> None:
    if as_json:
        print_json(info)
    else:
        typer.echo(f"Job {info.id} is {job_status_text(info)}")
        typer.echo(advice)
