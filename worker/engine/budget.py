"""How large the draft trees of a step may be: the paper's fixed rule, or one measured price for the whole batch.

A budget is made for one step and asked layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from worker.engine.cost_model import CostModel, load_class
from worker.engine.draft_tree import FloatArray, Forest
from worker.engine.rows import BoolArray, IntArray

_MOST = 256  # draft nodes of a step at most
_CAUGHT_UP = 16  # tokens that a drafter may be behind for a layer to be an ordinary one
_LEAST_GAIN = 0.03  # of a plain step's tokens: prices are not known so well that a smaller gain is one
_TIME_WEIGHT = 0.1  # of a new sample in the running time of a layer


class Budget(Protocol):
    """Decides which nodes are worth adding, which are expanded further, and which the target sees."""

    floor: float  # a node of less value is not worth a row under any circumstances

    def frontier(self, forest: Forest, layer: IntArray) -> IntArray:
        """Return the nodes of the newest layer to expand; none ends the growth."""

    def cut(self, forest: Forest) -> BoolArray:
        """Return the nodes to verify, a parent-closed set with every root."""


class PaperBudget:
    """OPT-Tree as published: the n best nodes of each tree; stop when a layer adds no more than the threshold."""

    floor = 0.0

    def __init__(self, nodes: int, threshold: float) -> None:
        """Take n and delta of the paper."""
        self._nodes = nodes
        self._threshold = threshold
        self._expected: FloatArray | float = 0.0

    def frontier(self, forest: Forest, layer: IntArray) -> IntArray:
        """Go on in the trees whose E(A) grew by more than the threshold, below the nodes that are among the n best."""
        best = forest.best(self._nodes)
        expected = forest.expected(best)
        alive = self.goes_on(expected - self._expected)
        self._expected = expected
        return layer[best[layer] & alive[forest.tree[layer]]]

    def goes_on(self, gain: FloatArray) -> BoolArray:
        """Return per tree whether what the last layer added to E(A) is enough."""
        return gain > self._threshold

    def cut(self, forest: Forest) -> BoolArray:
        """Verify all of the n best."""
        return forest.best(self._nodes)


class DraftCosts:
    """What a drafter costs and earns, as measured while decoding. Before anything is known, its layers are free."""

    def __init__(self) -> None:
        """Start knowing nothing."""
        self._layer_ms: dict[int, float] = {}  # by load class of the nodes expanded
        self._reads = 0
        self.row_ms = 0.0  # of reading one committed token, the drafter being far behind
        self.earned = 0.0  # tokens per tree and step, its own time deducted

    def layer_ms(self, nodes: int) -> float:
        """Return the time of a layer; of a size never seen, that of the nearest smaller one."""
        known = [size for size in self._layer_ms if size <= load_class(nodes)]
        return self._layer_ms[max(known)] if known else 0.0

    def observe(self, nodes: int, layer_ms: float) -> None:
        """Learn from a layer that was drafted."""
        size = load_class(nodes)
        before = self._layer_ms.get(size, layer_ms)
        self._layer_ms[size] = before + _TIME_WEIGHT * (min(layer_ms, 2 * before) - before)

    def observe_growth(self, behind: int, layers: Sequence[int], ms: float) -> None:
        """Learn from a step's layers of so many nodes, before which so many committed tokens were read."""
        if behind > _CAUGHT_UP * max(layers[:1], default=1):
            reading_ms = max(ms - sum(map(self.layer_ms, layers)), 0.0)
            self._reads += 1
            self.row_ms += max(_TIME_WEIGHT, 1 / self._reads) * (reading_ms / behind - self.row_ms)
            return
        for nodes in layers:
            self.observe(nodes, ms * nodes / sum(layers))

    def observe_earned(self, tokens: float) -> None:
        """Learn what one tree brought in one step over plain decoding."""
        self.earned += _TIME_WEIGHT * (tokens - self.earned)


class PricedBudget:
    """A node is worth a row if it brings more tokens than the engine makes in the time of the row.

    With `rate` tokens per millisecond (the price), the cut is the prefix of the batch's ranking with the most of
    `expected tokens - rate * time`, which maximises tokens per second over the run rather than in this step alone.
    """

    def __init__(
        self, nodes: int, costs: CostModel, drafts: DraftCosts, rate: float, rows: int, entries: float, trees: int
    ) -> None:
        """Price a step that has `rows` rows attending to `entries` KV entries even without drafts, of `trees` trees."""
        self._nodes = nodes
        self._drafts = drafts
        self._rate = rate
        self._least = _LEAST_GAIN * trees
        more = np.arange(min(_MOST, nodes * trees) + 1)
        ms = costs.step_ms(rows + more, entries * (1.0 + more / rows))
        self._price: FloatArray = rate * (ms - ms[0])  # in tokens, of so many nodes
        self.floor = float((self._price[1:] / more[1:]).min())

    def frontier(self, forest: Forest, layer: IntArray) -> IntArray:
        """Go on if the next layer can earn its time. It can't gain more than this one did: children share a parent.

        Only below nodes that may still enter the cut: the best of their trees, and of the batch.
        """
        if forest.size - len(forest.sequences) > min(self._nodes, _MOST):
            layer = layer[self._within(forest)[layer]]
        gain = float((forest.value[layer] - self.floor).sum())
        return layer if gain > self._rate * self._drafts.layer_ms(len(layer)) else layer[:0]

    def cut(self, forest: Forest) -> BoolArray:
        """Return the best prefix of the ranking; maybe none of it."""
        kept = np.zeros(forest.size, np.bool_)
        kept[: len(forest.sequences)] = True
        ranked = self._ranked(forest)
        net = forest.value[ranked].cumsum() - self._price[1 : len(ranked) + 1]
        if len(net) and net.max() > self._least:
            kept[ranked[: int(net.argmax()) + 1]] = True
        return kept

    def _ranked(self, forest: Forest) -> IntArray:
        """Return the draft nodes that the budget has room for, best first."""
        ranked = forest.ranking()
        if len(ranked) > self._nodes:  # some tree may have too many
            ranked = ranked[forest.best(self._nodes)[ranked]]
        return ranked[: len(self._price) - 1]

    def _within(self, forest: Forest) -> BoolArray:
        within = np.zeros(forest.size, np.bool_)
        within[self._ranked(forest)] = True
        return within
