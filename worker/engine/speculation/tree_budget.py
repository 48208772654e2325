"""How large the draft trees of a step may be: the paper's fixed rule, or one measured price for the whole batch.

A budget is made for one step and asked layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import numpy as np

from worker.engine.options import MAX_STEP_NODES
from worker.engine.segments import BoolArray, IntArray
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftCosts
from worker.engine.speculation.draft_tree import FloatArray, Forest

_MORE = np.arange(MAX_STEP_NODES + 1)
_LEAST_GAIN = 0.03  # of a plain step's tokens: prices are not known so well that a smaller gain is one


class Budget(Protocol):
    """Decides which nodes are worth adding, which are expanded further, and which the target sees."""

    @property
    def floor(self) -> float:
        """The value below which a node is not worth a row under any circumstances."""

    def frontier(self, forest: Forest, expanded: IntArray, layer: IntArray) -> IntArray:
        """Return the nodes to expand of the newest layer, which hangs below `expanded`; none ends the growth."""

    def cut(self, forest: Forest) -> BoolArray:
        """Return the nodes to verify, a parent-closed set with every root."""


class FixedBudget:
    """OPT-Tree as published: the n best nodes of each tree; stop when a layer adds no more than the threshold."""

    floor = 0.0

    def __init__(self, nodes: int, threshold: float) -> None:
        """Take n and delta of the paper."""
        self._nodes = nodes
        self._threshold = threshold
        self._expected: FloatArray | float = 0.0

    def frontier(self, forest: Forest, expanded: IntArray, layer: IntArray) -> IntArray:
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


class CostAwareBudget:
    """A node is worth a row if it brings more tokens than the engine makes in the time of the row.

    With `rate` tokens per millisecond (the price), the cut is the prefix of the batch's ranking with the most of
    `expected tokens - rate * time`, which maximises tokens per second over the run rather than in this step alone.
    """

    def __init__(
        self,
        nodes: int,
        costs: CostModel,
        drafts: DraftCosts,
        rate: Callable[[], float],
        rows: int,
        entries: float,
        trees: int,
    ) -> None:
        """Price a step that has `rows` rows attending to `entries` KV entries even without drafts, of `trees` trees.

        Nothing is computed before something was drafted: many a look for drafts finds nothing.
        """
        self._nodes = nodes
        self._costs = costs
        self._drafts = drafts
        self._asked_rate = rate
        self._rows = rows
        self._entries = entries
        self._trees = trees

    @cached_property
    def floor(self) -> float:
        """The cheapest row's price."""
        return float((self._price[1:] / _MORE[1 : len(self._price)]).min())

    @cached_property
    def _rate(self) -> float:
        return self._asked_rate()

    @cached_property
    def _price(self) -> FloatArray:
        """What so many nodes cost, in tokens."""
        more = _MORE[: min(MAX_STEP_NODES, self._nodes * self._trees) + 1]
        ms = self._costs.step_ms(self._rows + more, self._entries * (1.0 + more / self._rows))
        price: FloatArray = self._rate * (ms - ms[0])
        return price

    def frontier(self, forest: Forest, expanded: IntArray, layer: IntArray) -> IntArray:
        """Go on if the next layer is likely to earn its time, and only below nodes whose children can enter the cut."""
        depth = int(forest.depth[expanded[0]])
        if not len(layer):
            if depth:  # nobody asks what roots' children are worth before they are drafted
                self._drafts.observe_share(depth, 0.0, float(forest.value[expanded].sum()))
            return layer
        best = np.zeros(forest.size)
        np.maximum.at(best, forest.parent[layer], forest.value[layer])
        self._drafts.observe_share(depth, float(best[expanded].sum()), float(forest.value[expanded].sum()))
        if forest.size - len(forest.sequences) > min(self._nodes, MAX_STEP_NODES):
            layer = layer[self._within(forest)[layer]]
        values = self._values(forest)
        now = self._best(values)
        layer = layer[self._may_have_children(values, now, forest.value[layer])]
        if not len(layer):
            return layer
        children = self._drafts.share(depth + 1) * forest.value[layer]
        gain = self._best(_descending(values, children)) - now
        return layer if gain > self._rate * self._drafts.layer_ms(len(layer)) else layer[:0]

    def _best(self, values: FloatArray) -> float:
        """Return what the best cut brings, in tokens, of draft nodes with these values, descending."""
        values = values[: len(self._price) - 1]
        return float((values.cumsum() - self._price[1 : len(values) + 1]).max(initial=0.0))

    def _may_have_children(self, values: FloatArray, now: float, parents: FloatArray) -> BoolArray:
        """Return for parents whether their children can enter the cut beside nodes with `values`, which brings `now`.

        No child is worth more than its parent. One of that worth may get in alone (where rows get dearer, there is more
        room for it then) or beside all others of its layer (where rows come in flocks, they share the price).
        """
        room = len(self._price) - 1
        sums = np.zeros(min(len(values), room - 1) + 1)
        np.cumsum(values[: len(sums) - 1], out=sums[1:])
        with_one_more = np.maximum.accumulate((sums - self._price[1 : len(sums) + 1])[::-1])[::-1]
        rank = np.searchsorted(-values, -parents, side="right")  # a child stands behind its parent and all its equals
        alone = (rank < len(sums)) & (with_one_more[np.minimum(rank, len(sums) - 1)] + parents > now)
        if alone.all():
            return alone
        everything = _descending(values, parents)[:room]
        net = everything.cumsum() - self._price[1 : len(everything) + 1]
        beside = parents >= everything[int(net.argmax())] if net.max() > now else alone
        return alone | beside

    def cut(self, forest: Forest) -> BoolArray:
        """Return the best prefix of the ranking; maybe none of it."""
        kept = np.zeros(forest.size, np.bool_)
        kept[: len(forest.sequences)] = True
        ranked = self._ranked(forest)
        net = forest.value[ranked].cumsum() - self._price[1 : len(ranked) + 1]
        if len(net) and net.max() > _LEAST_GAIN * self._trees:
            kept[ranked[: int(net.argmax()) + 1]] = True
        return kept

    def _ranked(self, forest: Forest) -> IntArray:
        """Return the draft nodes that the budget has room for, best first."""
        ranked = forest.ranking()
        if len(ranked) > self._nodes:  # some tree may have too many
            ranked = ranked[forest.best(self._nodes)[ranked]]
        return ranked[: len(self._price) - 1]

    def _values(self, forest: Forest) -> FloatArray:
        """Return the values of the draft nodes that the budget has room for, descending."""
        drafted = forest.value[len(forest.sequences) :]
        if len(drafted) > self._nodes:
            return forest.value[self._ranked(forest)]
        return _descending(drafted)

    def _within(self, forest: Forest) -> BoolArray:
        within = np.zeros(forest.size, np.bool_)
        within[self._ranked(forest)] = True
        return within


def _descending(*some: FloatArray) -> FloatArray:
    """Return all values, the best first."""
    return np.sort(np.concatenate(some))[::-1]
