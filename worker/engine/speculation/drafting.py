"""Grow the draft trees of a step, layer by layer over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.tree_budget import Budget


class Drafter(Protocol):
    """A source of draft tokens. It keeps its own state per sequence and catches up lazily with committed tokens."""

    name: str

    @property
    def forward_free(self) -> Drafter | None:
        """The part of a drafter that runs no forward: itself, one of several, or None."""

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer children for the frontier nodes. Each call of a step is for the next layer of the same forest."""

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return how many committed tokens a forward of the drafter must read before it can draft for the sequence."""

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Learn what the target accepted: `path` are nodes of the drafted forest, `emitted` are the step's tokens."""

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The candidates that a drafter offered below a frontier, with the drafter's own probabilities."""

    frontier: IntArray
    offered: Candidates


Calibrate = Callable[[Forest, Layer], Candidates]  # a drafter's probabilities -> the estimates that trees are built on


_NONE: IntArray = np.empty(0, np.int64)


def as_offered(_: Forest, layer: Layer) -> Candidates:
    """Use the drafter's own probabilities, as OPT-Tree does."""
    return layer.offered


@dataclass(frozen=True, slots=True)
class Growth:
    """What was offered while trees grew, and where they may grow on."""

    layers: list[Layer]
    detached: IntArray  # ends of forced chains: only a drafter that runs no forward can expand them


def grow(
    forest: Forest, drafter: Drafter, budget: Budget, max_depth: int, roots: IntArray, calibrate: Calibrate = as_offered
) -> Growth:
    """Grow the trees below `roots` in place and return what was offered.

    Gains never rise with depth: a layer splits the value of the one above it. So the first layer that is not worth its
    cost is the right place to stop. Nodes of that layer can still be selected, since they are drafted already.

    Where a grammar forces the next tokens, they become nodes and the drafter is not asked. One that runs no forward
    goes on below them; a network has not read them.
    """
    layers: list[Layer] = []
    detached = [_NONE]
    everywhere = drafter.forward_free is drafter
    frontier = forest.expandable(roots)
    while len(frontier) and len(layers) < max_depth:
        offered = drafter.expand(forest, frontier)
        if forest.masks is not None:
            offered = forest.masks.permitted(frontier, offered)
        layers.append(Layer(frontier, offered))
        added = _NONE
        if offered.probabilities.any():
            added = forest.add_layer(frontier, calibrate(forest, layers[-1]), budget.min_value)
        frontier, ends = forest.force(forest.expandable(budget.frontier(forest, frontier, added)))
        if everywhere and len(ends):
            frontier = forest.expandable(np.concatenate([frontier, ends]))
        else:
            detached.append(ends)
    return Growth(layers, np.concatenate(detached))


def joined(layers: list[Layer]) -> list[Layer]:
    """Return the layers as one where that is possible: their offers are equally wide and of the same kind."""
    offers = [layer.offered for layer in layers]
    if len({(one.tokens.shape[1], one.source is None) for one in offers}) != 1:
        return layers
    sources = [one.source for one in offers if one.source is not None]
    candidates = Candidates(
        tokens=np.concatenate([one.tokens for one in offers]),
        probabilities=np.concatenate([one.probabilities for one in offers]),
        source=np.concatenate(sources) if sources else None,
    )
    return [Layer(np.concatenate([layer.frontier for layer in layers]), candidates)]
