"""How far a job is, for a person who waits: a bar on a terminal, a plain line now and then elsewhere.

client, cli -> [progress] -> rich.  Knows a job as it was read, no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.outcome import info_words, warns
from jobs.results import JobInfo

_LINE_EVERY_S = 10.0


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
            with _bar(console) if console.is_terminal else _lines(console) as tell:
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


def duration(seconds: float) -> str:
    """Return a time as a person says it."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[JobInfo], object]]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def tell(info: JobInfo) -> None:
            counts = info.request_counts
            progress.update(task, total=counts.total, completed=counts.ended, description=pace(info), refresh=True)

        yield tell


@contextmanager
def _lines(console: Console) -> Iterator[Callable[[JobInfo], object]]:
    said_at = float("-inf")

    def tell(info: JobInfo) -> None:
        nonlocal said_at
        now = time.monotonic()
        if info.status.final or now - said_at >= _LINE_EVERY_S:
            said_at = now
            counts = info.request_counts
            console.print(f"{counts.ended}/{counts.total} requests · {pace(info)}", highlight=False, soft_wrap=True)

    yield tell
