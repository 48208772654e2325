"""Evaluate a draft on held-out texts: acceptance at several tree sizes, and the calibration of its probabilities.

Results come as a table, as JSON and as a reliability plot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.speculation.drafting import Drafter
from worker.training.features import Example
from worker.training.replay import AcceptanceResult, ReplayTarget, replay

BUDGETS = (4, 8, 16, 32, 60)  # draft tree nodes per step
_PLOTTED_NODES = 16
_BINS = 10  # of the reliability plot

MakeDrafter = Callable[[HiddenStates], Drafter]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of a draft on held-out texts."""

    drafter: str
    texts: int
    tokens: int  # of the answers
    raw: tuple[AcceptanceResult, ...]  # one per budget; node values are the draft's probabilities
    calibrated: AcceptanceResult  # at _PLOTTED_NODES; node values are learned acceptance rates

    def as_json(self) -> dict[str, Any]:
        """Return the public JSON form."""
        return {
            "drafter": self.drafter,
            "texts": self.texts,
            "tokens": self.tokens,
            "budgets": [
                {
                    "nodes": result.nodes,
                    "steps": len(result.accepted),
                    "expected_acceptance": round(result.expected_acceptance, 4),
                    "tokens_per_step": round(result.tokens_per_step, 4),
                    "acceptance_by_depth": [round(share, 4) for share in result.by_depth],
                }
                for result in self.raw
            ],
            "calibration": {
                "nodes": self.calibrated.nodes,
                "mean_expected": round(float(self.calibrated.expected.mean()), 4),
                "mean_accepted": round(self.calibrated.expected_acceptance, 4),
                "relative_error": round(self.calibrated.error, 4),
            },
        }


def evaluate(
    examples: Sequence[Example],
    vocabulary: int,
    device: torch.device,
    make_drafter: MakeDrafter,
    progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Replay the examples at every budget; `progress` takes the number of replays done since its last call."""
    replay_target = ReplayTarget(examples, vocabulary, device)
    raw = []
    for nodes in BUDGETS:
        raw.append(replay(examples, replay_target, make_drafter, nodes))
        progress(1)
    calibrated = replay(examples, replay_target, make_drafter, _PLOTTED_NODES, calibrated=True)
    progress(1)
    written = sum(len(example.ids) - example.num_prompt for example in examples)
    name = make_drafter(replay_target.hidden).name
    return Evaluation(name, len(examples), written, tuple(raw), calibrated)


def table(evaluation: Evaluation) -> Table:
    """Return the evaluation as a table, one row per budget."""
    shown = Table(title=f"{evaluation.drafter} on {evaluation.texts} held-out texts, {evaluation.tokens} tokens")
    for column in ("nodes", "tokens/step", "E(A)", *(f"depth {depth}" for depth in range(1, 6))):
        shown.add_column(column, justify="right")
    for result in evaluation.raw:
        shares = [f"{share:.2f}" for share in result.by_depth[:5]]
        shown.add_row(str(result.nodes), f"{result.tokens_per_step:.2f}", f"{result.expected_acceptance:.2f}", *shares)
    return shown


def plot(evaluation: Evaluation, file: Path) -> None:
    """Write a PNG of expected against accepted draft tokens per step, before and after calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    raw = next(result for result in evaluation.raw if result.nodes == _PLOTTED_NODES)
    top = 0.0
    for label, result, marker in (("draft probabilities", raw, "o"), ("calibrated", evaluation.calibrated, "s")):
        expected, accepted, steps = _binned(result)
        axes.plot(expected, accepted, marker=marker, label=f"{label} (error {result.error:.0%})")
        axes.scatter(expected, accepted, s=steps / steps.max() * 160, alpha=0.25)
        top = max(top, expected.max(), accepted.max())
    axes.plot([0, top], [0, top], color="grey", linewidth=1, linestyle="--", label="perfect calibration")
    axes.set(xlabel="expected draft tokens per step, E(A)", ylabel="accepted draft tokens per step")
    axes.set_title(f"{evaluation.drafter}, {_PLOTTED_NODES} nodes, {len(raw.accepted)} steps", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def _binned(result: AcceptanceResult) -> tuple[Any, Any, Any]:
    """Split the steps into bins by expected tokens; return each bin's mean expected, mean accepted and step count."""
    order = np.argsort(result.expected, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    return (
        np.array([result.expected[part].mean() for part in parts]),
        np.array([result.accepted[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )
