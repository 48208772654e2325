"""Growing the draft trees of a step, layer by layer over the whole batch.

scheduler -> [drafting] -> verifier. `Drafter` is the one interface behind which every source of drafts stands.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from worker.engine.budget import Budget
from worker.engine.draft_tree import Candidates, Forest
from worker.engine.rows import BoolArray, IntArray
from worker.engine.sequence import Sequence


class Drafter(Protocol):
    """A source of draft tokens. It keeps its own state per sequence and catches up lazily with committed tokens."""

    name: str

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer children for the frontier nodes; every call of a step brings the next layer of the same forest."""

    def keep(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Learn what the target kept: `path` are nodes of the forest that was grown, `emitted` the step's tokens."""

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""


def grow(forest: Forest, drafter: Drafter, budget: Budget, max_depth: int, trees: int) -> BoolArray:
    """Grow the first `trees` trees of the forest in place and return the nodes to verify.

    A layer that was drafted is always eligible, and gains never rise with depth, so the first layer that is not worth
    its cost is the right place to stop.
    """
    best = forest.best(budget.nodes)
    expected = forest.expected(best)
    frontier = _expandable(forest, forest.roots[:trees])
    for _ in range(max_depth):
        if not len(frontier):
            break
        layer = forest.add_layer(frontier, drafter.expand(forest, frontier))
        best = forest.best(budget.nodes)
        grown = forest.expected(best)
        alive = budget.grows_on(grown - expected, grown)
        expected = grown
        frontier = _expandable(forest, layer[best[layer] & alive[forest.tree[layer]]])
    return budget.cut(forest, best)


def _expandable(forest: Forest, nodes: IntArray) -> IntArray:
    """Drop nodes whose children could never be emitted: behind an end of sequence, or beyond max_tokens."""
    useful = [
        forest.depth[node] + 2 <= sequence.remaining
        and not (forest.depth[node] and int(forest.token[node]) in sequence.eos_ids)
        for node in nodes
        for sequence in (forest.sequences[forest.tree[node]],)
    ]
    return nodes[np.array(useful, np.bool_)]
