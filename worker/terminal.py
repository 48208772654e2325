"""Helpers shared by the node's commands: settings from options, readable errors, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jobs.errors import InvalidValue
from jobs.processes import BAD_SETTINGS_STATUS
from worker.settings import WorkerSettings

FAILED = 1
_LINE_INTERVAL_S = 20.0  # between progress lines without a terminal


def settings_of(**given: Any) -> WorkerSettings:
    """Return the environment's settings, overridden by the given options that are not None."""
    return WorkerSettings(**{name: value for name, value in given.items() if value is not None})


def print_message(sentence: str) -> None:
    """Print a message to stderr; stdout is for results."""
    print(sentence, file=sys.stderr, flush=True)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors of the engine and of pydantic into one sentence and an exit status."""
    from worker.engine.errors import EngineError, ModelRefused

    try:
        yield
    except EngineError as error:
        print_message(str(error))
        raise typer.Exit(BAD_SETTINGS_STATUS if isinstance(error, ModelRefused) else FAILED) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidValue(first["msg"], param=".".join(str(part) for part in first["loc"])) from error


class ProgressBars:
    """Progress of the parts of a long task: bars on a terminal, else a line every 20 s."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._bars = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console)

    def __enter__(self) -> ProgressBars:
        if self._is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def part(self, name: str, total: int) -> Callable[..., None]:
        """Add a part; return a function that takes the progress made since the last call, and a note."""
        bar = self._bars.add_task(name, total=total, note="")
        started = printed_at = monotonic()

        def advance(more: int, note: str = "") -> None:
            nonlocal printed_at
            self._bars.update(bar, advance=more, note=note)
            if not self._is_terminal and monotonic() - printed_at > _LINE_INTERVAL_S:
                printed_at = monotonic()
                print_message(self._line(bar, printed_at - started, note))

        return advance

    def _line(self, bar: TaskID, seconds: float, note: str) -> str:
        task = self._bars.tasks[self._bars.task_ids.index(bar)]
        left = seconds / task.completed * ((task.total or 0) - task.completed) if task.completed else 0.0
        return f"{task.description}: {task.percentage:.0f}%, {max(left, 0.0) / 60:.1f} minutes left {note}".rstrip()
