"""How large the draft trees of a step may be: OPT-Tree's fixed rule, or one measured price for the whole batch.

A budget is made for one step and asked after every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import numpy as np

from worker.engine.host.growth import FixedRules, PricedRules
from worker.engine.host.nodes import FloatArray
from worker.engine.options import MAX_STEP_NODES
from worker.engine.segments import BoolArray, IntArray
from worker.engine.speculation.constants import BEST_CHILD_RECOVERY, BEST_CHILD_WEIGHT, MIN_NET_GAIN
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftCosts
from worker.engine.speculation.draft_tree import Forest

_COUNTS = np.arange(MAX_STEP_NODES + 1)


class Budget(Protocol):
    """Decides which nodes are added, which are expanded, and which the target verifies."""

    @property
    def min_value(self) -> float:
        """The value below which a node can't be worth its row."""

    def frontier(self, forest: Forest, expanded: IntArray, layer: IntArray) -> IntArray:
        """Return the nodes of the newest layer, below `expanded`, to expand next; none ends the growth."""

    def cut(self, forest: Forest) -> BoolArray:
        """Return the nodes to verify: a parent-closed set with every root."""

    def rules(self) -> FixedRules | PricedRules:
        """Return the rules by which compiled growth decides the same."""


class FixedBudget:
    """OPT-Tree as published (arXiv 2406.17276, section 3): n nodes per tree, and a threshold delta that ends growth."""

    min_value = 0.0

    def __init__(self, nodes: int, threshold: float) -> None:
        self._nodes = nodes
        self._threshold = threshold
        self._expected: FloatArray | float = 0.0
        self._best = np.empty(0, np.bool_)  # the n best nodes of every tree, after the newest layer

    def frontier(self, forest: Forest, expanded: IntArray, layer: IntArray) -> IntArray:
        """Return the new nodes among the n best of their trees, in trees whose E(A) grew by more than delta."""
        self._best = forest.best(self._nodes)
        expected = forest.expected(self._best)
        growing = self.should_continue(expected - self._expected)
        self._expected = expected
        return layer[self._best[layer] & growing[forest.tree[layer]]]

    def should_continue(self, gain: FloatArray) -> BoolArray:
        """Return per tree whether the last layer added enough to E(A)."""
        return gain > self._threshold

    def cut(self, forest: Forest) -> BoolArray:
        """Verify the n best nodes of every tree."""
        return self._best if len(self._best) == forest.size else forest.best(self._nodes)

    def rules(self) -> FixedRules:
        """Return the rules by which compiled growth decides the same."""
        return FixedRules(self._nodes, self._threshold)


class CostAwareBudget:
    """A node is worth a row if it brings more tokens than the engine writes in the time of the row.

    Let lambda be the throughput in tokens per ms (`price`). The cut is the prefix of the batch's ranking that maximises
    `expected tokens - lambda * time`. That maximises tokens over time of the whole run, not of this step alone
    (Dinkelbach's method for ratios, 1967); no speculation is the empty prefix. The nodes are chosen for E(A) as in
    OPT-Tree, but for all trees together.
    """

    def __init__(
        self,
        nodes: int,
        costs: CostModel,
        drafts: DraftCosts,
        price: Callable[[], float],
        rows: int,
        entries: float,
        trees: int,
        limit: int = MAX_STEP_NODES,
    ) -> None:
        """Price a step of `trees` trees that has at most `limit` draft nodes.

        Without drafts it has `rows` rows that attend to `entries` KV entries.

        Prices are computed on first use: most lookups find no drafts, and then no time may be spent on prices.
        """
        self._nodes = nodes
        self._costs = costs
        self._drafts = drafts
        self._get_price = price
        self._rows = rows
        self._entries = entries
        self._trees = trees
        self._limit = min(limit, nodes * trees, MAX_STEP_NODES)

    def rules(self) -> PricedRules:
        """Return the rules by which compiled growth decides the same."""
        curve, drafts = self._costs.curve, self._drafts
        return PricedRules(
            nodes=self._nodes,
            node_limit=self._limit,
            price=self._price,
            rows=self._rows,
            entries=self._entries,
            min_gain=MIN_NET_GAIN * self._trees,
            drift=curve.drift,
            entry_ms=curve.entry_ms,
            sizes=curve.sizes,
            points=curve.points,
            best_child=drafts.best_child,
            best_child_weight=BEST_CHILD_WEIGHT,
            best_child_recovery=BEST_CHILD_RECOVERY,
            layer_ms=drafts.known_layer_ms,
        )

    @cached_property
    def min_value(self) -> float:
        """The lowest price of a row, in tokens, over all numbers of rows."""
        return float((self._row_prices[1:] / _COUNTS[1 : len(self._row_prices)]).min())

    @cached_property
    def _price(self) -> float:
        return self._get_price()

    @cached_property
    def _row_prices(self) -> FloatArray:
        """The price in tokens of 0, 1, 2, … nodes together."""
        nodes = _COUNTS[: self._limit + 1]
        ms = self._costs.step_ms(self._rows + nodes, self._entries * (1.0 + nodes / self._rows))
        prices: FloatArray = self._price * (ms - ms[0])
        return prices

    def frontier(self, forest: Forest, expanded: IntArray, layer: IntArray) -> IntArray:
        """Return the new nodes whose children can enter the cut, if the next layer is expected to earn its time."""
        depth = int(forest.depth[expanded[0]])
        if not len(layer):
            if depth:  # the ratio of roots is never used: their children are always drafted
                self._drafts.observe_best_children(depth, 0.0, _sum(forest.value[expanded]))
            return layer
        best = np.zeros(forest.size)
        np.maximum.at(best, forest.parent[layer], forest.value[layer])
        self._drafts.observe_best_children(depth, _sum(best[expanded]), _sum(forest.value[expanded]))
        if forest.size - len(forest.sequences) > min(self._nodes, self._limit):
            layer = layer[self._within(forest)[layer]]
        values = self._values(forest)
        now = self._best_net(values)
        layer = layer[self._may_have_children(values, now, forest.value[layer])]
        if not len(layer):
            return layer
        children = self._drafts.best_child_ratio(depth + 1) * forest.value[layer]
        gain = self._best_net(_descending(values, children)) - now
        return layer if gain > self._price * self._drafts.layer_ms(len(layer)) else layer[:0]

    def _best_net(self, values: FloatArray) -> float:
        """Return the net tokens of the best cut of draft nodes with these values, which are descending."""
        values = values[: len(self._row_prices) - 1]
        return float((values.cumsum() - self._row_prices[1 : len(values) + 1]).max(initial=0.0))

    def _may_have_children(self, values: FloatArray, now: float, parents: FloatArray) -> BoolArray:
        """Return for each parent whether its children can enter the cut; without them the cut of `values` nets `now`.

        No child is worth more than its parent. One with its parent's value may enter alone (if rows get dearer, there
        is more space for one) or with all others of its layer (if rows are priced in steps, they share one).
        """
        capacity = len(self._row_prices) - 1
        sums = np.zeros(min(len(values), capacity - 1) + 1)
        np.cumsum(values[: len(sums) - 1], out=sums[1:])
        net_with_one_more = np.maximum.accumulate((sums - self._row_prices[1 : len(sums) + 1])[::-1])[::-1]
        rank = np.searchsorted(-values, -parents, side="right")  # a child ranks after its parent and all equals
        alone = (rank < len(sums)) & (net_with_one_more[np.minimum(rank, len(sums) - 1)] + parents > now)
        if alone.all():
            return alone
        everything = _descending(values, parents)[:capacity]
        net = everything.cumsum() - self._row_prices[1 : len(everything) + 1]
        together = parents >= everything[int(net.argmax())] if net.max() > now else alone
        return alone | together

    def cut(self, forest: Forest) -> BoolArray:
        """Return the best prefix of the ranking: possibly the roots alone."""
        kept = np.zeros(forest.size, np.bool_)
        kept[: len(forest.sequences)] = True
        ranked = self._ranked(forest)
        net = forest.value[ranked].cumsum() - self._row_prices[1 : len(ranked) + 1]
        if len(net) and net.max() > MIN_NET_GAIN * self._trees:
            kept[ranked[: int(net.argmax()) + 1]] = True
        return kept

    def _ranked(self, forest: Forest) -> IntArray:
        """Return the draft nodes within the limits of nodes per tree and step, best first."""
        ranked = forest.ranking()
        if len(ranked) > self._nodes:  # some tree may have too many
            ranked = ranked[forest.best(self._nodes)[ranked]]
        return ranked[: len(self._row_prices) - 1]

    def _values(self, forest: Forest) -> FloatArray:
        """Return the values of the nodes of `_ranked`, descending."""
        drafted = forest.value[len(forest.sequences) :]
        if len(drafted) > self._nodes:
            return forest.value[self._ranked(forest)]
        return _descending(drafted)

    def _within(self, forest: Forest) -> BoolArray:
        """Return a mask of the forest that is True for the nodes of `_ranked`."""
        within = np.zeros(forest.size, np.bool_)
        within[self._ranked(forest)] = True
        return within


def _sum(some: FloatArray) -> float:
    """Return the sum, added up in order, as compiled growth does it."""
    return float(some.cumsum()[-1])


def _descending(*some: FloatArray) -> FloatArray:
    """Return all values, the highest first."""
    return np.sort(np.concatenate(some))[::-1]
