"""Laws of the bits of a row, for any model and KV, and the text and the tree that they read."""

from __future__ import annotations

import numpy as np
import torch

from worker.engine.model.packed_model import PackedModel
from worker.engine.segments import KvMove, Segment, chain

TEXT = [int(i) for i in np.random.default_rng(0).integers(2, 60, 90)]


def tree(slot: int, prefix: int) -> Segment:
    """Return a tree: root 0 has children 1 and 2; 1 has child 3, 2 has child 5, 3 has child 4."""
    parents = [-1, 0, 0, 1, 3, 2]
    visible = np.eye(6, dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    depth = visible.sum(1) - 1
    return Segment(slot, prefix, prefix, np.array([7, 8, 9, 10, 11, 12]), prefix + depth, visible, np.arange(6))


def check_rows(model: PackedModel) -> None:
    """Assert that a row has the same bits alone, in a batch, in a tree and in any chunk."""
    whole = [model.forward([chain(slot, 0, TEXT[:33], keep_last=True)]) for slot in range(3)]
    for start in range(0, 33, 7):
        piece = model.forward([chain(3, start, TEXT[start : min(start + 7, 33)], keep_last=True)])
    assert torch.equal(piece, whole[0])
    shown = tree(1, 33)
    path = [0, 1, 3, 4]
    alone = [
        model.forward([chain(0, 33 + i, [int(shown.ids[node])], keep_last=True)])[0] for i, node in enumerate(path)
    ]
    others = [chain(0, 0, TEXT[:20], keep_last=True), shown, chain(2, 33, TEXT[:17], keep_last=True)]
    together = model.forward(others)[1:-1]
    for i, node in enumerate(path):
        assert torch.equal(together[node], alone[i])


def check_moves(model: PackedModel) -> None:
    """Assert that an accepted path and a copied prefix keep all that is stored of a token."""
    for slot in range(2):
        model.forward([chain(slot, 0, TEXT[:33], keep_last=True)])
    shown = tree(0, 33)
    model.forward([shown])
    model.compact([KvMove(0, 34, 33 + np.array([1, 3, 4]))])
    model.forward([chain(1, 33, [int(shown.ids[node]) for node in (0, 1, 3, 4)], keep_last=True)])
    model.kv.poison(2)
    model.copy_prefix(0, 2, 37)
    after = [model.forward([chain(slot, 37, [5], keep_last=True)]) for slot in range(3)]
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])


def check_threads(model: PackedModel) -> None:
    """Assert that bits do not depend on the number of threads."""
    step = [chain(0, 0, TEXT[:50], keep_last=True), chain(1, 0, TEXT[:3], keep_last=True)]
    alone, before = model.forward(step).clone(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(model.forward(step), alone)
    finally:
        torch.set_num_threads(before)
