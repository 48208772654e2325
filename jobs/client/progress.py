"""How far a job is, for a person who waits: a bar on a terminal, a line that changes in a notebook, else lines.

Knows a job as it was read, no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from jobs.client.outcome import info_words, warns
from jobs.client.results import JobInfo

_LINE_EVERY_S = 10.0
_BAR_WIDTH = 20  # of 80 columns


class ProgressBar:
    """Shows a job as it is told, on standard error: standard output is for what was asked for."""

    @classmethod
    @contextmanager
    def of(cls, progress: Callable[[JobInfo], object] | bool) -> Iterator[Callable[[JobInfo], object]]:
        """Yield whom to tell: the callable given, a progress bar for True, nobody for False."""
        if callable(progress):
            yield progress
        elif not progress:
            yield lambda info: None
        else:
            console = Console(stderr=True)
            with _shown(console) as tell:
                yield tell


def pace(info: JobInfo) -> str:
    """Say how fast a job runs, and how long it will take."""
    progress = info.progress
    parts = [f"{progress.completion_tokens:,} tokens"]
    if progress.tokens_per_s:
        parts.append(f"{progress.tokens_per_s:,.1f} tokens/s")
    failed = info.request_counts.failed
    if failed and not warns(info.status, failed):
        parts.append(f"{failed} failed")
    if info.status.final:
        parts.append(info_words(info))
    elif progress.time_left_s is not None:
        parts.append(f"about {duration(progress.time_left_s)} left")
    return " · ".join(parts)


def line(info: JobInfo) -> str:
    """Say how far a job is, in one line."""
    return f"{info.request_counts.ended}/{info.request_counts.total} requests · {pace(info)}"


def local_time(seconds: float) -> str:
    """Return a time of the service as clocks show it here."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def ago(seconds: float, now: float) -> str:
    """Return how long ago a time was, roughly; the clocks of two machines may differ."""
    passed = max(0.0, now - seconds)
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if passed >= unit:
            return f"{passed // unit:.0f} {name} ago"
    return f"{passed:.0f} s ago"


def duration(seconds: float) -> str:
    """Return a time as a person says it."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _shown(console: Console) -> AbstractContextManager[Callable[[JobInfo], object]]:
    if console.is_jupyter:
        return _line_in_a_notebook()
    return _bar(console) if console.is_terminal else _lines(console)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[JobInfo], object]]:
    words = TextColumn("{task.description}", table_column=Column(overflow="fold"))  # wraps where the window is narrow
    columns = (BarColumn(_BAR_WIDTH), MofNCompleteColumn(), words, TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def tell(info: JobInfo) -> None:
            counts = info.request_counts
            progress.update(task, total=counts.total, completed=counts.ended, description=pace(info), refresh=True)

        yield tell


@contextmanager
def _line_in_a_notebook() -> Iterator[Callable[[JobInfo], object]]:
    """Show one line below the cell that changes in place: plain text, which every notebook can show."""
    from IPython.display import display

    shown = display({"text/plain": ""}, raw=True, display_id=True)

    def tell(info: JobInfo) -> None:
        shown.update({"text/plain": line(info)}, raw=True)

    yield tell


@contextmanager
def _lines(console: Console) -> Iterator[Callable[[JobInfo], object]]:
    said_at = float("-inf")

    def tell(info: JobInfo) -> None:
        nonlocal said_at
        now = time.monotonic()
        if info.status.final or now - said_at >= _LINE_EVERY_S:
            said_at = now
            console.print(line(info), highlight=False, soft_wrap=True)

    yield tell
