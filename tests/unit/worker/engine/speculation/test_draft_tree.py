"""Laws of draft trees: the n best nodes form the optimal tree, ties included, and budgets cut at the optimum."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from tests.unit.worker.engine.harness import FLAT_COSTS, Unverified, sequences
from worker.engine.host.nodes import FloatArray
from worker.engine.segments import BoolArray, IntArray
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftCosts, DraftTimes
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import grow
from worker.engine.speculation.tree_budget import CostAwareBudget, FixedBudget

WIDTH = 3


class TableDrafter(Unverified):
    """A drafter with the same conditional probabilities below every node of a depth, or with random ones."""

    name = "table"

    def __init__(self, rng: np.random.Generator | None = None, row: tuple[float, ...] = (0.5, 0.3, 0.2)) -> None:
        self._rng = rng
        self._row = np.array(row)
        self.calls = 0
        self.expanded = 0

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        self.calls += 1
        self.expanded += len(frontier)
        shape = (len(frontier), WIDTH)
        rows = (
            np.tile(self._row, (len(frontier), 1))
            if self._rng is None
            else self._rng.dirichlet([0.5] * WIDTH, len(frontier))
        )
        return Candidates(np.tile(np.arange(WIDTH), (shape[0], 1)), rows)


def full_forest(rng: np.random.Generator, trees: int = 1, depth: int = 3) -> Forest:
    forest = Forest(sequences(max_tokens=50)[:trees])
    grow(forest, TableDrafter(rng), FixedBudget(10**6, -1.0), depth, np.arange(trees))
    return forest


def best_subtree_value(forest: Forest, size: int) -> float:
    """Return the highest E(A) of any parent-closed set of `size` draft nodes of one tree, by brute force."""
    nodes = range(1, forest.size)
    sets = (set(chosen) for chosen in combinations(nodes, size))
    trees = (s for s in sets if all(forest.parent[v] in s or forest.parent[v] == 0 for v in s))
    return max(float(sum(forest.value[v] for v in tree)) for tree in trees)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_n_best_nodes_are_the_best_tree_of_n_nodes(seed: int, size: int) -> None:
    forest = full_forest(np.random.default_rng(seed), depth=2)
    chosen = forest.expected(forest.best(size))[0]
    assert chosen == pytest.approx(best_subtree_value(forest, size))


@pytest.mark.parametrize("seed", range(5))
def test_expanding_only_nodes_in_the_cut_loses_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    conditionals = rng.dirichlet([0.5] * WIDTH, 400)

    class Fixed(TableDrafter):
        forward_free = None

        def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
            keys = [_path_key(forest, int(node)) for node in frontier]
            return Candidates(np.tile(np.arange(WIDTH), (len(frontier), 1)), conditionals[keys])

    pruned, whole = (Forest(sequences()[:1]) for _ in range(2))
    grow(pruned, Fixed(), FixedBudget(8, 0.0), 4, np.arange(1))
    grow(whole, Fixed(), FixedBudget(10**6, -1.0), 4, np.arange(1))
    assert pruned.expected(pruned.best(8))[0] == pytest.approx(whole.expected(whole.best(8))[0])


def _path_key(forest: Forest, node: int) -> int:
    key = 0
    while forest.parent[node] >= 0:
        key = key * (WIDTH + 1) + int(forest.token[node]) + 1
        node = int(forest.parent[node])
    return key % 400


@pytest.mark.parametrize(
    "row", [(1.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3), (1.0, 1.0, 1.0), (1e-300, 1e-300, 0.0), (0.0, 0.0, 0.0)]
)
@pytest.mark.parametrize("nodes", [1, 2, 6, 30])
def test_ties_certainty_and_underflow_keep_every_parent(row: tuple[float, ...], nodes: int) -> None:
    forest = Forest(sequences(max_tokens=50)[:2])
    grow(forest, TableDrafter(row=row), FixedBudget(nodes, 0.0), 5, np.arange(2))
    kept = forest.best(nodes)
    forest.pruned(kept)  # asserts that every kept node has its parent
    assert (np.bincount(forest.tree[kept]) <= nodes + 1).all()


def test_gains_never_rise_with_depth() -> None:
    gains: list[float] = []

    class Watching(FixedBudget):
        def should_continue(self, gain: FloatArray) -> BoolArray:
            gains.append(float(gain[0]))
            return gain > -1.0

    for seed in range(10):
        gains.clear()
        grow(
            Forest(sequences(max_tokens=50)[:1]),
            TableDrafter(np.random.default_rng(seed)),
            Watching(6, 0.0),
            6,
            np.arange(1),
        )
        assert gains == sorted(gains, reverse=True)


def test_the_threshold_stops_growth_and_the_last_layer_stays_eligible() -> None:
    forest, drafter = Forest(sequences(max_tokens=50)[:1]), TableDrafter(row=(0.6, 0.0, 0.0))
    grow(forest, drafter, FixedBudget(60, 0.3), 10, np.arange(1))
    # Layers add 0.6, 0.36, 0.216, …: the third adds too little, so it is the last one drafted, and it is kept.
    assert drafter.calls == 3
    assert forest.depth[FixedBudget(60, 0.3).cut(forest)].max() == 3


def test_depth_is_bounded_by_the_layers_drafted() -> None:
    forest, drafter = Forest(sequences(max_tokens=50)[:1]), TableDrafter(row=(1.0, 0.0, 0.0))
    grow(forest, drafter, FixedBudget(60, 0.0), 4, np.arange(1))
    assert (drafter.calls, forest.depth.max()) == (4, 4)


def test_nodes_that_could_never_be_emitted_are_not_drafted() -> None:
    almost_done = sequences(max_tokens=3)[:1]
    forest = Forest(almost_done)
    grow(forest, TableDrafter(), FixedBudget(60, 0.0), 10, np.arange(1))
    assert forest.depth.max() == 2  # two draft tokens and the target's own make three
    ends = sequences(max_tokens=50, eos_ids=[0])[:1]
    forest = Forest(ends)
    grow(forest, TableDrafter(), FixedBudget(60, 0.0), 3, np.arange(1))
    assert not (forest.token[forest.parent[1:]] == 0)[forest.parent[1:] > 0].any()


def priced(
    costs: CostModel, price: float, trees: int, nodes: int = 60, drafts: DraftCosts | None = None
) -> CostAwareBudget:
    return CostAwareBudget(nodes, costs, drafts or DraftCosts(), lambda: price, rows=trees, entries=0.0, trees=trees)


STAIRS = CostModel({1: 10.0, 4: 11.0, 8: 15.0, 16: 26.0, 64: 90.0})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
def test_the_priced_cut_is_the_best_of_all_sets_of_nodes(seed: int, rate: float) -> None:
    """Brute force over every subset, across the sequences: parents included or not, the cut is the optimum."""
    forest = full_forest(np.random.default_rng(seed), trees=2, depth=1)
    forest.add_layer(np.array([2]), Candidates(np.array([[0, 1, 2]]), np.array([[0.6, 0.3, 0.1]])))
    kept = priced(STAIRS, rate, 2).cut(forest)
    forest.pruned(kept)  # asserts that every kept node has its parent

    def net(chosen: tuple[int, ...]) -> float:
        ms = STAIRS.step_ms(2 + len(chosen)) - STAIRS.step_ms(2)
        return float(sum(forest.value[node] for node in chosen) - rate * ms)

    nodes = range(2, forest.size)
    best = max(net(chosen) for size in range(len(nodes) + 1) for chosen in combinations(nodes, size))
    assert net(tuple(np.flatnonzero(kept)[2:].tolist())) == pytest.approx(best)


def test_the_cut_is_the_global_optimum_of_costs_with_steps() -> None:
    """The cut passes a local maximum: the second row is expensive, the third to eighth are free."""
    shelf = CostModel({1: 10.0, 2: 14.0, 8: 14.0, 16: 60.0})
    forest = Forest(sequences(max_tokens=50)[:1])
    forest.add_layer(forest.roots, Candidates(np.array([[0, 1, 2, 3]]), np.array([[0.3, 0.25, 0.2, 0.15]])))
    assert priced(shelf, 0.1, 1).cut(forest).sum() == 5


def test_no_tree_is_worth_its_price_when_rows_cost_as_much_as_steps() -> None:
    forest = full_forest(np.random.default_rng(3), trees=3)
    steep = CostModel({1: 10.0, 2: 20.0, 64: 640.0})
    assert priced(steep, 0.1, 3).cut(forest).sum() == 3


SHELF = CostModel({1: 10.0, 2: 14.0, 8: 14.0, 16: 60.0})


@pytest.mark.parametrize("row", [(0.6, 0.3, 0.1), (0.9, 0.05, 0.03), (0.35, 0.3, 0.25)])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("costs", [STAIRS, SHELF])
def test_only_nodes_that_can_enter_the_cut_are_drafted(
    costs: CostModel, rate: float, row: tuple[float, float, float]
) -> None:
    """With free layers the cut is as good as with fully grown trees, and far fewer nodes are drafted."""
    drafter, forest = TableDrafter(row=row), Forest(sequences(max_tokens=50)[:2])
    budget = priced(costs, rate, 2)
    layers = grow(forest, drafter, budget, 6, np.arange(2)).layers
    whole = Forest(sequences(max_tokens=50)[:2])
    everywhere = grow(whole, TableDrafter(row=row), FixedBudget(10_000, 0.0), 6, np.arange(2)).layers

    def net(grown: Forest) -> float:
        kept = priced(costs, rate, 2).cut(grown)
        chosen = int(kept.sum()) - 2
        return float(grown.value[kept][2:].sum() - rate * (costs.step_ms(2 + chosen) - costs.step_ms(2)))

    assert net(forest) == pytest.approx(net(whole))
    assert sum(len(layer.frontier) for layer in layers) < sum(len(layer.frontier) for layer in everywhere) / 10


def test_a_layer_is_drafted_if_best_children_have_been_worth_its_cost() -> None:
    """A layer costs half a token: worth it below nodes of 0.9 with good children, and soon not below 0.55."""
    costs, layers = CostModel({1: 10.0, 64: 10.0}), DraftCosts(DraftTimes({1: 1.0}, {1: 1.0}, 0.0))

    def depth(row: tuple[float, float, float]) -> int:
        drafter = TableDrafter(row=row)
        grow(Forest(sequences(max_tokens=50)[:1]), drafter, priced(costs, 0.5, 1, drafts=layers), 10, np.arange(1))
        return drafter.calls

    assert depth((0.9, 0.0, 0.0)) > 3
    for _ in range(60):
        depth((0.55, 0.0, 0.0))
    assert depth((0.55, 0.0, 0.0)) == 1


def test_depth_stops_at_the_first_layer_that_does_not_pay_its_draft() -> None:
    slow = DraftCosts(DraftTimes({1: 1.0}, {1: 1.0}, 0.0))
    drafter, forest = TableDrafter(row=(0.8, 0.0, 0.0)), Forest(sequences(max_tokens=50)[:1])
    budget = priced(CostModel({1: 10.0, 64: 10.0}), 0.5, 1, drafts=slow)
    grow(forest, drafter, budget, 10, np.arange(1))
    # Layers are worth 0.8, 0.64, 0.512, 0.4096; another costs half a token. The fourth is drafted, the fifth is not.
    assert drafter.calls == 4


def test_a_tree_has_no_more_nodes_than_allowed() -> None:
    forest = full_forest(np.random.default_rng(3), trees=2)
    free = CostModel({1: 10.0, 64: 10.0})
    kept = priced(free, 0.1, 2, nodes=5).cut(forest)
    assert np.bincount(forest.tree[kept]).tolist() == [6, 6]


def test_the_same_input_gives_the_same_plan() -> None:
    plans = []
    for _ in range(2):
        forest = full_forest(np.random.default_rng(5), trees=2)
        plans.append(priced(FLAT_COSTS, 0.1, 2).cut(forest).tolist())
    assert plans[0] == plans[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_row_sees_its_ancestors_and_itself_and_nothing_else(seed: int) -> None:
    forest = full_forest(np.random.default_rng(seed), trees=2)
    shown = forest.pruned(forest.best(9))
    nodes = shown.nodes_of(1)
    visible = shown.segments(2)[0][1].visible
    assert visible is not None
    for i, node in enumerate(nodes):
        walked = set()
        while node >= 0:
            walked.add(int(node))
            node = shown.parent[node]
        assert {int(nodes[j]) for j in visible[i].nonzero()[0]} == walked


def test_of_equal_nodes_those_of_the_sequence_with_most_tokens_left_come_first() -> None:
    some = sequences(max_tokens=50)[:3]
    for sequence, written in zip(some, (9, 2, 5), strict=True):
        sequence.ids += [3] * written
    forest = Forest(some)
    grow(forest, TableDrafter(row=(0.5, 0.0, 0.0)), FixedBudget(2, -1.0), 2, np.arange(3))
    ranked = forest.ranking()
    assert forest.tree[ranked].tolist() == [1, 2, 0] * 2
    assert forest.depth[ranked].tolist() == [1] * 3 + [2] * 3, "however much is left, a parent precedes its children"
