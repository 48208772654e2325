"""Show the progress of a job while it runs: a bar on a terminal, one changing line in a notebook, else lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from jobs.client.durations import duration_text
from jobs.client.outcome import completed_with_failures, job_status_text
from jobs.client.results import JobInfo
from jobs.messages import JobStatus

if TYPE_CHECKING:
    from rich.console import Console

Report = Callable[[JobInfo], object]
ProgressCallback = Report | bool  # called with each JobInfo; True: a progress bar

_LINE_EVERY_S = 10.0
_BAR_WIDTH = 20  # columns, so that the texts beside the bar fit into 80


@contextmanager
def progress_reporter(progress: ProgressCallback) -> Iterator[Report]:
    """Yield the function to call with each JobInfo. For True, it draws a progress bar on standard error."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda info: None
    else:
        from rich.console import Console

        with _display(Console(stderr=True)) as report:
            yield report


def speed_text(info: JobInfo) -> str:
    """Return tokens, tokens per second, failures, and the time left or the final status."""
    progress = info.progress
    parts = [f"{progress.completion_tokens:,} tokens"]
    if progress.tokens_per_s:
        parts.append(f"{progress.tokens_per_s:,.1f} tokens/s")
    if progress.requests_cached:
        parts.append(f"{progress.requests_cached:,} cached")
    failed = info.request_counts.failed
    if failed and not completed_with_failures(info.status, failed):
        parts.append(f"{failed} failed")
    if info.status.final:
        parts.append(job_status_text(info))
    elif info.status is JobStatus.PAUSED:
        parts.append("paused")
    elif progress.time_left_s is not None:
        parts.append(f"about {duration_text(progress.time_left_s)} left")
    return " · ".join(parts)


def progress_line(info: JobInfo) -> str:
    """Return the progress of a job in one line."""
    return f"{info.request_counts.ended}/{info.request_counts.total} requests · {speed_text(info)}"


def _display(console: Console) -> AbstractContextManager[Report]:
    if console.is_jupyter:
        return _notebook_line()
    return _bar(console) if console.is_terminal else _lines(console)


@contextmanager
def _bar(console: Console) -> Iterator[Report]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    text = TextColumn("{task.description}", table_column=Column(overflow="fold"))  # wraps in a narrow window
    columns = (BarColumn(_BAR_WIDTH), MofNCompleteColumn(), text, TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def report(info: JobInfo) -> None:
            counts = info.request_counts
            progress.update(
                task, total=counts.total, completed=counts.ended, description=speed_text(info), refresh=True
            )

        yield report


@contextmanager
def _notebook_line() -> Iterator[Report]:
    """Update one line below the cell. It is plain text, which every notebook can show."""
    from IPython.display import display

    shown = display({"text/plain": ""}, raw=True, display_id=True)

    def report(info: JobInfo) -> None:
        shown.update({"text/plain": progress_line(info)}, raw=True)

    yield report


@contextmanager
def _lines(console: Console) -> Iterator[Report]:
    printed_at = float("-inf")

    def report(info: JobInfo) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if info.status.final or now - printed_at >= _LINE_EVERY_S:
            printed_at = now
            console.print(progress_line(info), highlight=False, soft_wrap=True)

    yield report
