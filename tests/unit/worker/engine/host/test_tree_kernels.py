"""Laws of the host's work on trees: the compiled functions return the bits of their twin in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest

from tests.unit.worker.engine.harness import sequences
from worker.engine.host import tree_kernels as selection
from worker.engine.host.bins import Bins
from worker.engine.host.numpy_kernels import NumpyKernels, siblings
from worker.engine.host.tree_kernels import TreeKernels
from worker.engine.segments import IntArray
from worker.engine.speculation.draft_tree import Candidates, Forest

VOCAB = 4  # so few that draws match drafts
EDGES = np.array([0.1, 0.25, 0.5, 0.75])
SEEDS = range(6)

Twins = tuple[TreeKernels, TreeKernels]


@pytest.fixture(scope="module")
def twins() -> Twins:
    compiled = selection.tree_kernels()
    assert not isinstance(compiled, NumpyKernels), "there is no C compiler"
    return compiled, NumpyKernels()


def offered(rng: np.random.Generator, rows: int) -> Candidates:
    """Return candidates of few probabilities, so that many values are equal, and some empty entries."""
    shape = (rows, 3)
    probabilities = rng.choice([0.0, 0.05, 0.25, 0.5, 0.8, 1.0, np.nan], shape, p=[0.2, 0.1, 0.2, 0.2, 0.2, 0.05, 0.05])
    return Candidates(rng.integers(0, VOCAB, shape), probabilities, rng.integers(0, 3, shape))


def grown(seed: int) -> Forest:
    """Return the trees of sequences of different lengths in mixed slots, some roots alone, and a forced token."""
    rng = np.random.default_rng(seed)
    some = sequences([[2, 3]] * 7, max_tokens=9)
    for slot, sequence in zip(rng.permutation(20), some, strict=False):
        sequence.slot = int(slot)
        sequence.ids += [3] * int(rng.integers(0, 8))
        sequence.eos_ids = frozenset(rng.integers(0, VOCAB, 1).tolist())
    forest = Forest(some, 0.9)
    forest.append(np.array([6]), np.array([6]), np.array([2]), np.array([1]), np.ones(1), forced=True)
    frontier = np.append(np.sort(rng.permutation(6)[:4]), 7)
    for _ in range(4):
        frontier = forest.add_layer(frontier, offered(rng, len(frontier)), 0.01)
    return forest


def same(one: object, other: object) -> bool:
    """Return whether arrays, or dataclasses and tuples of them, are equal in every bit."""
    if isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray)
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return all(same(a, b) for a, b in zip(_parts(one), _parts(other), strict=True))


def _parts(some: object) -> Iterator[object]:
    if isinstance(some, tuple):
        yield from some
    else:
        yield from (getattr(some, field.name) for field in fields(some))  # type: ignore[arg-type]  # a dataclass


def drawn_of(forest: Forest, seed: int) -> IntArray:
    drawn = np.random.default_rng(seed).integers(-1, VOCAB, forest.size)
    drawn[6] = 2  # the forced token
    return drawn


@pytest.mark.parametrize("seed", SEEDS)
def test_growth_and_selection_are_the_same(twins: Twins, seed: int) -> None:
    forest = grown(seed)
    compiled, plain = twins
    layers = []
    for kernels in twins:
        copy, rng = grown(seed), np.random.default_rng(seed)
        frontier = np.flatnonzero(copy.depth == copy.depth[-1])
        kernels.add_layer(copy, frontier, offered(rng, len(frontier)), 0.1)
        layers.append((copy.tree, copy.parent, copy.token, copy.depth, copy.value, copy.forced))
    assert same(*layers)
    everything, ends, left = np.arange(forest.size), forest.columns.end_keys, forest.remaining
    assert same(*(k.expandable(forest, everything, ends, left) for k in twins))
    assert same(*(k.ranking(forest, left) for k in twins))
    assert same(*(k.summary(forest) for k in twins))
    assert same(compiled.expected(forest, None), plain.expected(forest, None))
    for per_tree in (0, 1, 4, 100):
        kept = compiled.best(forest, per_tree)
        assert same(kept, plain.best(forest, per_tree))
        assert same(*(k.expected(forest, kept) for k in twins))
        pruned = [Forest(forest.columns) for _ in twins]
        for kernels, target in zip(twins, pruned, strict=True):
            target.allocate(forest.size)
            kernels.prune(forest, kept, target)
        assert same(*((p.tree, p.parent, p.token, p.depth, p.value, p.forced) for p in pruned))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("trees", [0, 4, 7])
def test_rows_for_the_target_are_the_same(twins: Twins, seed: int, trees: int) -> None:
    forest = grown(seed)
    assert same(*(k.tree_rows(forest, trees, forest.slots, forest.lengths) for k in twins))


@pytest.mark.parametrize("seed", SEEDS)
def test_accepted_paths_and_their_moves_are_the_same(twins: Twins, seed: int) -> None:
    forest = grown(seed)
    drawn = drawn_of(forest, seed)
    assert same(*(k.matching_children(forest, drawn) for k in twins))
    (counts, visited, tokens), others = (k.paths(forest, drawn) for k in twins)
    assert same((counts, visited, tokens), others)
    assert counts.any(), "nothing was accepted"
    assert same(*(k.moves(forest, counts, visited, forest.slots, forest.lengths) for k in twins))
    for emitted in (counts + 1, np.minimum(counts + 1, 1)):
        assert same(*(k.drawn_ranks(forest, counts, visited, emitted) for k in twins))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sources", [False, True])
def test_statistics_of_acceptance_are_the_same(twins: Twins, seed: int, sources: bool) -> None:
    forest = grown(seed)
    frontier, rng = np.flatnonzero(forest.depth < forest.depth[-1]), np.random.default_rng(seed)
    some, drawn = offered(rng, len(frontier)), drawn_of(forest, seed)[frontier]
    some = some if sources else Candidates(some.tokens, some.probabilities)
    sampled = np.arange(forest.trees) % 2 == 0
    tables = []
    for kernels in twins:
        bins = Bins(EDGES, sources=3, depth_classes=3, prior=4.0)
        for _ in range(3):
            kernels.count_accepted(forest, frontier, some, sampled, bins, drawn)
        value = kernels.corrected(forest, frontier, some, sampled, bins, 0.995)
        tables.append((bins.accepted, bins.expected, value))
    assert same(*tables)
    assert (tables[0][0] != 4.0).any(), "nothing was counted"


@pytest.mark.parametrize("discount", [0.7, 1.0, 1.3])
def test_no_draft_is_worth_more_than_its_parent_even_below_a_forced_token(twins: Twins, discount: float) -> None:
    forest = Forest(sequences([[2, 3]] * 2), discount)
    forest.append(np.array([1]), np.array([1]), np.array([2]), np.array([1]), np.ones(1), forced=True)
    frontier = np.array([0, 2])
    for _ in range(2):
        frontier = forest.add_layer(
            frontier, Candidates(np.full((len(frontier), 1), 3), np.full((len(frontier), 1), 0.99))
        )
    parents = forest.parent[2:]
    drafted = parents >= 2
    assert drafted.sum() == 3
    assert (forest.value[2:][drafted] <= forest.value[parents[drafted]]).all()
    for kernels in twins:
        ranked = kernels.ranking(forest, forest.remaining).tolist()
        assert all(
            forest.parent[node] < 2 or forest.parent[node] in ranked[:place] for place, node in enumerate(ranked)
        )


def test_siblings_are_ranked_by_value_and_counted() -> None:
    forest = Forest(sequences(max_tokens=50)[:2])
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    below = forest.add_layer(np.arange(2), Candidates(tokens, np.array([[0.2, 0.5, 0.3], [0.4, 0.0, 0.4]])))
    forest.add_layer(below[1:2], Candidates(tokens[:1], np.array([[0.1, 0.0, 0.9]])))

    rank, children = siblings(forest)

    assert children.tolist() == [3, 2, 0, 2, 0, 0, 0, 0, 0]
    assert rank[2:].tolist() == [2, 0, 1, 0, 1, 1, 0]  # of equals the one drafted first
