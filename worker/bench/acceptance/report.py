"""A curve as tables, JSON lines and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from worker.bench.acceptance.curve import CurveCell

CLAIM_ACCEPTANCE = 0.7
CLAIMED = {1: 1.9, 16: 1.5, 64: 1.2}  # speed-up by batch at that acceptance
FLOOR = 0.99  # no cell may be slower


def as_json(pair: str, cell: CurveCell) -> str:
    """Return a cell as a JSON line; `pair` names target and draft."""
    fields = {name: value for name, value in asdict(cell).items() if value or name == "texts_agree"}
    speedup = None if cell.speedup is None else round(cell.speedup, 3)
    rounded = {
        "acceptance": round(cell.acceptance, 3),
        "speedups": [round(one, 3) for one in cell.speedups],
        "tokens_per_step": round(cell.tokens_per_step, 2),
        "nodes_per_step": round(cell.nodes_per_step, 2),
        "decisions": dict(cell.decisions),
    }
    return json.dumps({"pair": pair, **fields, **rounded, "speedup": speedup})


def tables(title: str, cells: Sequence[CurveCell]) -> list[Table]:
    """Return the speed-ups by acceptance and batch, and the tokens per step beside the nodes that were verified."""
    return [
        _table(f"{title}: speed-up, opt-tree / plain", cells, _speedup),
        _table("tokens / draft nodes per step and sequence", cells, _tokens),
    ]


def _table(title: str, cells: Sequence[CurveCell], text: Callable[[CurveCell], str]) -> Table:
    table = Table("acceptance", title=title)
    batches = sorted({cell.batch for cell in cells})
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    for name in dict.fromkeys(cell.profile for cell in cells):
        row = {cell.batch: cell for cell in cells if cell.profile == name}
        first = next(iter(row.values())).acceptance
        label = name if name == f"{first:g}" else f"{name} ({first:.2f})"
        table.add_row(label, *(text(row[batch]) if batch in row else "" for batch in batches))
    return table


def _speedup(cell: CurveCell) -> str:
    if cell.speedup is None:
        return cell.skipped.partition(":")[0]
    return f"{cell.speedup:.2f}" if cell.texts_agree else "TEXT DIFFERS"


def _tokens(cell: CurveCell) -> str:
    return f"{cell.tokens_per_step:.2f} / {cell.nodes_per_step:.1f}" if cell.speedups else ""


def findings(cells: Iterable[CurveCell]) -> list[str]:
    """Return a sentence for each cell that differs from what is claimed, skipped or has another text."""
    said = []
    for cell in cells:
        where = f"Acceptance {cell.profile}, batch {cell.batch}"
        if cell.speedup is None:
            said.append(f"{where}: not measured, {cell.skipped}.")
            continue
        if not cell.texts_agree:
            said.append(f"{where}: the texts differ from plain decoding.")
        claimed = CLAIMED.get(cell.batch, FLOOR) if cell.profile == f"{CLAIM_ACCEPTANCE:g}" else FLOOR
        if cell.speedup < claimed:
            steps = ", ".join(f"{count} {name}" for name, count in cell.decisions)
            said.append(f"{where}: {cell.speedup:.3f}, below {claimed:g}; steps of the last run: {steps}.")
    return said


def plot(title: str, cells: Sequence[CurveCell], file: Path) -> None:
    """Write a PNG with a line of speed-ups by batch for each acceptance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(cell.profile for cell in cells):
        points = [(cell.batch, cell.speedup) for cell in cells if cell.profile == name and cell.speedup is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    batches = sorted({cell.batch for cell in cells})
    axes.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="sequences decoded together", ylabel="speed-up, opt-tree / plain")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.legend(title="acceptance", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=150)
