"""Laws of growth in C: the trees, statistics and cuts of its twin in Python, whatever offers the candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from tests.unit.worker.engine.harness import Unverified, sequences
from tests.unit.worker.engine.host.test_tree_kernels import same
from worker.engine.host.growth import CompiledGrowth, bigram_source, growth_library
from worker.engine.host.nodes import FloatArray
from worker.engine.host.sources import CompiledSource
from worker.engine.segments import IntArray
from worker.engine.speculation.acceptance_model import AcceptanceModel
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftCosts, DraftTimes
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import (
    BOTH,
    Calibrate,
    Drafter,
    Growth,
    Layer,
    Parts,
    as_offered,
    grow,
    grow_compiled,
    merged,
)
from worker.engine.speculation.tree_budget import Budget, CostAwareBudget, FixedBudget

VOCAB = 6
SEEDS = range(8)
DEPTH = 5


class Bigrams(Unverified):
    """A drafter whose candidates depend on the token above them."""

    name = "bigrams"

    def __init__(self, seed: int, width: int, kind: type = np.float64) -> None:
        rng = np.random.default_rng(seed)
        self.tokens = np.stack([rng.permutation(VOCAB)[:width] for _ in range(VOCAB)])
        some = rng.choice(
            [0.0, 0.05, 0.2, 0.4, 0.7, 1.0, np.nan], (VOCAB, width), p=[0.2, 0.1, 0.2, 0.2, 0.2, 0.05, 0.05]
        )
        self.probabilities = (some * rng.choice([1.0, 0.93], some.shape)).astype(kind)
        self.layers = 0

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        above = forest.token[frontier]
        return Candidates(self.tokens[above], self.probabilities[above])


class CompiledBigrams(Bigrams):
    """The same, in C."""

    def source(self, forest: Forest, roots: IntArray) -> CompiledSource:
        found = bigram_source(self.tokens, self.probabilities)
        assert found is not None
        return found


class Narrowing(Bigrams):
    """A drafter that offers less in every other layer, as one does whose memory is short."""

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        offered = super().expand(forest, frontier)
        if forest.depth[frontier[0]] % 2:
            return Candidates(np.zeros((len(frontier), 1), np.int64), np.zeros((len(frontier), 1)))
        return offered


class Two:
    """Two drafters in one."""

    name = "two"
    forward_free = None
    label = 0

    def __init__(self, *parts: Drafter) -> None:
        self.parts = parts
        self.num_uncached_tokens, self.commit, self.drop = (
            parts[0].num_uncached_tokens,
            parts[0].commit,
            parts[0].drop,
        )

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        return merged(*(part.expand(forest, frontier) for part in self.parts))


def drafter(kind: str, seed: int) -> Drafter:
    parts: dict[str, Callable[[], Drafter]] = {
        "layers": lambda: Bigrams(seed, 3, np.float32),
        "narrowing": lambda: Narrowing(seed, 3),
        "compiled": lambda: CompiledBigrams(seed, 3),
        "half compiled": lambda: Two(Bigrams(seed, 4, np.float32), CompiledBigrams(seed + 50, 2)),
        "both compiled": lambda: Two(CompiledBigrams(seed, 2), CompiledBigrams(seed + 50, 3)),
        "silent part": lambda: Two(Bigrams(seed, 3), Narrowing(seed + 50, 2)),
    }
    return parts[kind]()


def forest_of(seed: int, trees: int) -> Forest:
    """Return trees of sequences with different ends and tokens left."""
    rng = np.random.default_rng(seed)
    some = sequences([[2, 3]] * trees, max_tokens=9)
    for slot, sequence in enumerate(some):
        sequence.slot = slot
        sequence.ids += rng.integers(0, VOCAB, int(rng.integers(0, 8))).tolist()
        sequence.eos_ids = frozenset(rng.integers(0, VOCAB, 1).tolist())
    return Forest(some, float(rng.choice([0.8, 1.0])))


def budget_of(kind: str, seed: int, trees: int, drafts: DraftCosts) -> Budget:
    rng = np.random.default_rng(seed)
    nodes = int(rng.choice([1, 4, 9, 60]))
    if kind == "fixed":
        return FixedBudget(nodes, float(rng.choice([-1.0, 0.0, 0.3])))
    rows = {1: 10.0, 4: 11.0, 8: 15.0, 16: 26.0, 64: 90.0} if seed % 3 else {4: 10.0}
    costs = CostModel(rows, 0.01)
    costs.observe(5, 30.0, 13.7)
    price = float(rng.choice([0.01, 0.05, 0.2, 0.6]))
    limit = int(rng.choice([2, 12, 256]))
    return CostAwareBudget(nodes, costs, drafts, lambda: price, trees + int(rng.integers(0, 3)), 31.0, trees, limit)


def acceptance_of(seed: int) -> AcceptanceModel:
    """Return a model that has seen some draws."""
    model, rng = AcceptanceModel(), np.random.default_rng(seed)
    forest = forest_of(seed, 3)
    for source in (None, rng.integers(0, BOTH + 1, (3, 4))):
        offered = Candidates(rng.integers(0, VOCAB, (3, 4)), rng.random((3, 4)), source)
        model.learn(forest, forest.roots, offered, rng.integers(-1, VOCAB, 3))
    return model


Offer = tuple[int, int, int, str, int]  # node, place, token, probability, source


@dataclass(frozen=True)
class Grown:
    """All that one growth leaves."""

    nodes: tuple[IntArray, ...]
    cut: tuple[IntArray, ...]
    kept: IntArray
    expanded: IntArray
    best_child: FloatArray
    offered: list[Offer]


def estimates(acceptance: AcceptanceModel, forest: Forest, layer: Layer) -> Candidates:
    return acceptance.of(forest, layer.frontier, layer.offered)


def columns(forest: Forest) -> tuple[IntArray, ...]:
    return (forest.tree, forest.parent, forest.token, forest.depth, forest.value, forest.forced)  # type: ignore[return-value]


def offers(growth: Growth) -> list[Offer]:
    """Return all candidates but empty entries."""
    found = []
    for layer in growth.layers:
        for row, node in enumerate(layer.frontier.tolist()):
            source = layer.offered.source
            for place, probability in enumerate(layer.offered.probabilities[row].astype(float).tolist()):
                if probability:
                    label = 0 if source is None else int(source[row, place])
                    found.append((node, place, int(layer.offered.tokens[row, place]), repr(probability), label))
    return found


def results(forest: Forest, growth: Growth, selected: Forest, kept: IntArray, drafts: DraftCosts) -> Grown:
    return Grown(
        columns(forest),
        columns(selected),
        kept,
        np.array(growth.expanded, np.int64),
        drafts.best_child,
        offers(growth),
    )


@pytest.mark.parametrize("kind", ["layers", "narrowing", "compiled", "half compiled", "both compiled", "silent part"])
@pytest.mark.parametrize("rule", ["fixed", "priced"])
def test_compiled_growth_makes_the_trees_of_its_twin(kind: str, rule: str) -> None:
    library = growth_library()
    assert library is not None, "there is no C compiler"
    growth = CompiledGrowth(library, DEPTH)
    most = 0
    for seed in SEEDS:
        trees = (1, 2, 7)[seed % 3]
        acceptance = acceptance_of(seed) if seed % 2 else None
        found = []
        for compiled in (False, True):
            forest, drafts = forest_of(seed, trees), DraftCosts(DraftTimes({1: 0.7}, {1: 0.5, 4: 0.9}, 0.1))
            drafts.observe_best_children(1, 0.7, 1.0)
            budget, some = budget_of(rule, seed, trees, drafts), drafter(kind, seed)
            if compiled:
                correction = None if acceptance is None else acceptance.correction(forest)
                grown = grow_compiled(growth, forest, Parts.of(some), budget, DEPTH, forest.roots, correction)
                selected = forest.emptied()
                kept = growth.cut(forest, selected)
            else:
                calibrate: Calibrate = as_offered
                if acceptance is not None:
                    calibrate = partial(estimates, acceptance)
                grown = grow(forest, some, budget, DEPTH, forest.roots, calibrate)
                cut = budget.cut(forest)
                selected, kept = forest.pruned(cut), np.flatnonzero(cut)
            found.append(results(forest, grown, selected, kept, drafts))
            most = max(most, forest.size)
        one, other = found
        assert one.offered == other.offered, (kind, rule, seed)
        for name in ("nodes", "cut", "kept", "expanded", "best_child"):
            assert same(getattr(one, name), getattr(other, name)), (kind, rule, seed, name)
    assert most > 20, "no tree has grown"
