"""Accepted paths of many trees at once are those of a walk from each root."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.worker.engine.harness import sequences
from worker.engine.segments import IntArray
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.sequence_columns import SequenceColumns
from worker.engine.speculation.verifier import walk

VOCAB = 4  # so few that drafts are often drawn


def walked(forest: Forest, root: int, drawn: IntArray) -> list[int]:
    """Return the nodes that a walk from one root visits."""
    visited = [root]
    while True:
        children = np.flatnonzero((forest.parent == visited[-1]) & (forest.token == drawn[visited[-1]]))
        if not len(children):
            return visited
        visited.append(int(children[-1]))


@pytest.mark.parametrize("seed", range(4))
def test_paths_follow_the_draws_from_every_root(seed: int) -> None:
    rng = np.random.default_rng(seed)
    forest = Forest(sequences([[2], [3], [2, 3]]))
    frontier = forest.roots
    for _ in range(3):
        offered = Candidates(rng.integers(0, VOCAB, (len(frontier), 3)), rng.random((len(frontier), 3)))
        frontier = forest.add_layer(frontier, offered, 0.2)
    rows = rng.permutation(forest.size)
    logits = torch.from_numpy(rng.random((forest.size, VOCAB)))
    drawn = logits.argmax(-1).numpy()[rows]
    accepted = walk(forest, logits, rows)
    for root in range(3):
        expected = walked(forest, root, drawn)
        assert [root, *accepted.path(root)] == expected
        assert accepted.bonus[root] == drawn[expected[-1]]
    assert (accepted.drawn == drawn[accepted.visited]).all()


def test_tokens_end_the_sequences_that_name_them() -> None:
    some = sequences([[2]] * 3)
    some[0].eos_ids, some[1].eos_ids = frozenset([5, 6]), frozenset([7])
    columns = SequenceColumns(some)
    for index, eos_ids in enumerate([{5, 6}, {7}, set()]):
        tokens = np.arange(10)
        assert set(tokens[columns.ends(np.full(10, index), tokens)].tolist()) == eos_ids
