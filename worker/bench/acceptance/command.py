"""Run a curve with the options of a command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from jobs.errors import InvalidValue
from worker.bench.acceptance.curve import AcceptanceCurve, CurveCell, CurvePlan
from worker.bench.acceptance.pair import random_pair
from worker.bench.acceptance.profile import AcceptanceProfile, names, profile_of
from worker.bench.acceptance.report import as_json, findings, plot, tables

BATCHES = (1, 8, 16, 32, 64, 128)
RATES = ("0.7", "0.5", "0.6", "0.8", "0.9")  # the claimed one first: time may end before the last
ALL = "all"  # as acceptances: RATES and every packaged profile
TEXTS_DIFFER = 1  # exit status
_NO_DEADLINE_S = 1e7
_LOG_WIDTH = 120  # columns of a table that is not printed on a terminal


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """Options of the command."""

    model: str
    draft: str
    acceptance: str  # comma-separated, or ALL
    batches: tuple[int, ...] = BATCHES
    tokens: int = 96
    runs: int = 3
    seed: int = 0
    layers: int | None = None
    cell_s: float = 60.0
    deadline_s: float | None = None  # of everything, loading included
    as_json: bool = False
    plot: Path | None = None


def parse_acceptance(text: str) -> tuple[AcceptanceProfile, ...]:
    """Parse acceptances such as `0.5,0.7,smollm2-135m-head`. Raises InvalidValue."""
    asked = [*RATES, *names()] if text.strip() == ALL else text.split(",")
    return tuple(profile_of(one) for one in asked)


def run(options: CurveOptions, on_message: Callable[[str], None]) -> int:
    """Measure and print the curve; return the exit status. Raises InvalidValue or ModelRefused for bad options."""
    started = time.monotonic()
    profiles = parse_acceptance(options.acceptance)
    batches = tuple(sorted(set(options.batches)))
    if options.tokens < 2:
        raise InvalidValue("the curve needs two tokens per text at least", param="--max-tokens")
    plan = CurvePlan(profiles, batches, options.tokens, options.runs, options.cell_s, options.seed)

    def left() -> float:
        return (options.deadline_s or _NO_DEADLINE_S) - (time.monotonic() - started)

    clock = clock_of()
    on_message(f"Making {options.model} and {options.draft} with random weights")
    pair = random_pair(options.model, options.draft, batches, options.tokens, clock, layers=options.layers)
    title = f"{options.model} with {options.draft}, {pair.dtype}, {pair.device}"
    cells: list[CurveCell] = []
    for cell in AcceptanceCurve(pair, plan, clock, left).cells():
        cells.append(cell)
        on_message(f"Acceptance {cell.profile}, batch {cell.batch}: {cell.skipped or f'{cell.speedup:.2f}'}")
        if options.as_json:
            print(as_json(title, cell), flush=True)
    _print(options, title, cells)
    return 0 if all(cell.texts_agree for cell in cells) else TEXTS_DIFFER


def _print(options: CurveOptions, title: str, cells: list[CurveCell]) -> None:
    said = findings(cells)
    if options.as_json:
        print(json.dumps({"pair": title, "findings": said}), flush=True)
    else:
        console = Console()
        console = console if console.is_terminal else Console(width=_LOG_WIDTH)
        for table in tables(title, cells):
            console.print(table)
        for sentence in said:
            console.print(sentence, markup=False, highlight=False)
    if options.plot is not None:
        plot(title, cells, options.plot)


def clock_of() -> Callable[[], float]:
    """Return the clock of engines: the thread's CPU time if it does all the work, which other processes don't disturb.

    Otherwise wall time.
    """
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter
