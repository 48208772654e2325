"""`basic submit --dry-run`: what a submission would become, with prompts counted by the tokenizer if it is here."""

from __future__ import annotations

from importlib.metadata import entry_points

import typer

from jobs.cli.options import FAILED, print_json
from jobs.client.async_client import CountPrompts
from jobs.client.results import JobCheck
from jobs.control_characters import safe

_SHOWN = 10  # refused requests that are printed


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
