"""Measure CPU time of the engine's thread: of a step without the target's own work, or of prompts that arrive.

python -m worker.bench.host_costs --sequences 64,256 --mode plain,trees
python -m worker.bench.host_costs --arrivals 256
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.errors import InvalidValue
from worker.bench.host_costs.arrivals import KINDS, ArrivalCosts, measure_arrivals
from worker.bench.host_costs.steps import MODES, HostCosts, measure
from worker.benchmark import parse_batches

Costs = TypeVar("Costs", HostCosts, ArrivalCosts)


def main(
    sequences: Annotated[str, typer.Option(help="Sequences decoded together, comma-separated.")] = "64,256",
    mode: Annotated[
        str,
        typer.Option(
            help="plain; trees: 8 nodes for each sequence; layers: the same, from a drafter in Python; "
            "opt-tree: suffix drafts. Comma-separated."
        ),
    ] = "plain,trees,opt-tree",
    steps: Annotated[
        int, typer.Option(min=1, help="Steps that are timed per line, and as many whose parts are.")
    ] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of every sequence.")] = 0.0,
    arrivals: Annotated[
        int, typer.Option(min=0, help="Measure as many prompts that arrive at once instead. 0: measure steps.")
    ] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each kind of arrivals.")] = 25,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure the CPU time of the engine's thread per step, or for prompts that arrive; without the target's own work.

    Example: python -m worker.bench.host_costs --sequences 64,256 --mode plain --json
    """
    try:
        counts = parse_batches(sequences)
    except InvalidValue as error:
        raise typer.BadParameter(error.message) from None
    modes = mode.split(",")
    if unknown := set(modes) - set(MODES):
        raise typer.BadParameter(f"--mode: {', '.join(sorted(unknown))}: must be of {', '.join(MODES)}")
    torch.set_num_threads(1)
    if arrivals:
        _print([measure_arrivals(arrivals, kind, runs) for kind in KINDS], _arrivals_table, as_json)
        return
    costs = [measure(count, name, steps, temperature) for name in modes for count in counts]
    _print(costs, _steps_table, as_json)


def _print(costs: Sequence[Costs], table_of: Callable[[Sequence[Costs]], Table], as_json: bool) -> None:
    if as_json:
        for one in costs:
            print(json.dumps(asdict(one)))
        return
    Console().print(table_of(costs))


def _steps_table(costs: Sequence[HostCosts]) -> Table:
    table = Table("CPU ms per step", *(f"{one.mode} {one.sequences}" for one in costs))
    for part in costs[0].parts_ms:
        table.add_row(part, *(f"{one.parts_ms.get(part, 0.0):.3f}" for one in costs))
    table.add_row("all", *(f"{one.mean_ms:.3f}" for one in costs), end_section=True)
    table.add_row("median", *(f"{one.median_ms:.3f}" for one in costs))
    table.add_row("fastest tenth", *(f"{one.low_ms:.3f}" for one in costs))
    for name in ("tokens_per_step", "nodes_per_step", "result_bytes"):
        table.add_row(name.replace("_", " "), *(f"{getattr(one, name):.0f}" for one in costs))
    return table


def _arrivals_table(costs: Sequence[ArrivalCosts]) -> Table:
    table = Table("CPU ms", *(f"{one.prompts} ({one.arrivals})" for one in costs))
    for name in (
        "receive_ms",
        "queue_ms",
        "schedule_ms",
        "first_step_ms",
        "admission_ms",
        "admission_best_ms",
        "all_ms",
    ):
        table.add_row(name.removesuffix("_ms").replace("_", " "), *(f"{getattr(one, name):.2f}" for one in costs))
    table.add_row("steps", *(str(one.steps) for one in costs))
    return table


if __name__ == "__main__":
    typer.run(main)
