"""Evaluation of a draft: what it foresees of held-out texts at several budgets, and whether its promises hold.

A table for people, JSON for programs, and a reliability plot.
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

BUDGETS = (4, 8, 16, 32, 60)
_PLOTTED = 16  # nodes of the reliability plot
_BINS = 10

MakeDrafter = Callable[[HiddenStates], Drafter]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a draft did on held-out texts."""

    drafter: str
    texts: int
    tokens: int  # of the answers
    raw: tuple[AcceptanceResult, ...]  # by budget, nodes valued by the draft's own probabilities
    calibrated: AcceptanceResult  # at one budget, nodes valued by learned acceptance

    def as_json(self) -> dict[str, Any]:
        """Return the public form."""
        return {
            "drafter": self.drafter,
            "texts": self.texts,
            "tokens": self.tokens,
            "budgets": [
                {
                    "nodes": f.nodes,
                    "steps": len(f.accepted),
                    "expected_acceptance": round(f.expected_acceptance, 4),
                    "tokens_per_step": round(f.tokens_per_step, 4),
                    "acceptance_by_depth": [round(share, 4) for share in f.by_depth],
                }
                for f in self.raw
            ],
            "calibration": {
                "nodes": self.calibrated.nodes,
                "mean_expected": round(float(self.calibrated.expected.mean()), 4),
                "mean_accepted": round(self.calibrated.expected_acceptance, 4),
                "relative_error": round(self.calibrated.error, 4),
            },
        }


def evaluate(
    lessons: Sequence[Example],
    vocabulary: int,
    device: torch.device,
    make_drafter: MakeDrafter,
    progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Replay the lessons at every budget; `progress` takes how many replays are done."""
    replay_target = ReplayTarget(lessons, vocabulary, device)
    raw = []
    for nodes in BUDGETS:
        raw.append(replay(lessons, replay_target, make_drafter, nodes))
        progress(1)
    calibrated = replay(lessons, replay_target, make_drafter, _PLOTTED, calibrated=True)
    progress(1)
    written = sum(len(example.ids) - example.num_prompt for example in lessons)
    name = make_drafter(replay_target.hidden).name
    return Evaluation(name, len(lessons), written, tuple(raw), calibrated)


def table(evaluation: Evaluation) -> Table:
    """Return the evaluation for people."""
    shown = Table(title=f"{evaluation.drafter} on {evaluation.texts} held-out texts, {evaluation.tokens} tokens")
    for column in ("nodes", "tokens/step", "E(A)", *(f"depth {depth}" for depth in range(1, 6))):
        shown.add_column(column, justify="right")
    for f in evaluation.raw:
        shares = [f"{share:.2f}" for share in f.by_depth[:5]]
        shown.add_row(str(f.nodes), f"{f.tokens_per_step:.2f}", f"{f.expected_acceptance:.2f}", *shares)
    return shown


def plot(evaluation: Evaluation, file: Path) -> None:
    """Write a PNG: what was promised a step against what was accepted, before and after calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    raw = next(f for f in evaluation.raw if f.nodes == _PLOTTED)
    top = 0.0
    for label, of, marker in (("as the draft says", raw, "o"), ("calibrated", evaluation.calibrated, "s")):
        promised, realised, steps = _binned(of)
        axes.plot(promised, realised, marker=marker, label=f"{label} (off by {of.error:.0%})")
        axes.scatter(promised, realised, s=steps / steps.max() * 160, alpha=0.25)
        top = max(top, promised.max(), realised.max())
    axes.plot([0, top], [0, top], color="grey", linewidth=1, linestyle="--", label="what is promised is kept")
    axes.set(xlabel="draft tokens promised a step, E(A)", ylabel="draft tokens accepted a step")
    axes.set_title(f"{evaluation.drafter}, {_PLOTTED} nodes, {len(raw.accepted)} steps", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def _binned(of: AcceptanceResult) -> tuple[Any, Any, Any]:
    """Return mean promise, mean acceptance and the steps of each tenth of the steps, by promise."""
    order = np.argsort(of.expected, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    return (
        np.array([of.expected[part].mean() for part in parts]),
        np.array([of.accepted[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )
