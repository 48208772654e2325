"""How large the draft trees of a step may be: the paper's fixed rule, or one measured price for the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from worker.engine.cost_model import CostModel
from worker.engine.draft_tree import FloatArray, Forest
from worker.engine.rows import BoolArray


class Budget(Protocol):
    """Decides, layer by layer, whether trees grow on, and which of their nodes the target sees."""

    @property
    def nodes(self) -> int:
        """Draft nodes of one tree at most."""

    def grows_on(self, gain: FloatArray, expected: FloatArray) -> BoolArray:
        """Return per tree whether to draft another layer, given what the last one added to E(A) [trees]."""

    def cut(self, forest: Forest, best: BoolArray) -> BoolArray:
        """Return the nodes to verify, a parent-closed subset of `best` with every root."""


@dataclass(frozen=True, slots=True)
class PaperBudget:
    """OPT-Tree as published: the n best nodes of each tree; stop when a layer adds no more than the threshold."""

    nodes: int
    threshold: float

    def grows_on(self, gain: FloatArray, expected: FloatArray) -> BoolArray:
        """Go on while E(A) grew by more than the threshold."""
        return gain > self.threshold

    def cut(self, forest: Forest, best: BoolArray) -> BoolArray:
        """Verify all of the n best."""
        return best


@dataclass(frozen=True, slots=True)
class PricedBudget:
    """Tokens per second of the step decide: nodes enter, best first over the whole batch, while the rate rises."""

    nodes: int
    costs: CostModel
    other_rows: int  # prompt rows that share the step
    layer_ms: float  # recent time of one draft layer

    def grows_on(self, gain: FloatArray, expected: FloatArray) -> BoolArray:
        """Go on where the gain is worth the tree's share of another layer at the step's tokens per millisecond."""
        trees = len(gain)
        per_ms = (trees + float(expected.sum())) / self.costs.plain_step_ms(trees)
        return gain > max(per_ms * self.layer_ms / trees, 0.01)

    def cut(self, forest: Forest, best: BoolArray) -> BoolArray:
        """Return the prefix of the batch's ranking with the most expected tokens per millisecond; maybe none."""
        ranked = forest.ranking()
        ranked = ranked[best[ranked]]
        roots = len(forest.sequences)
        tokens = roots + np.concatenate([[0.0], forest.value[ranked].cumsum()])
        rows = self.other_rows + roots + np.arange(len(ranked) + 1)
        size = int((tokens / self.costs.verify_ms(rows)).argmax())
        kept = np.zeros(forest.size, np.bool_)
        kept[:roots] = True
        kept[ranked[:size]] = True
        return kept
