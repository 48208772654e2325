"""Laws of the bits of a row, for models that store weights or KV in fewer bytes."""

from __future__ import annotations

import torch

from tests.unit.worker.engine.cpu.test_kernels import TEXT, tree
from worker.engine.model.packed_model import PackedModel
from worker.engine.segments import chain


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


def check_threads(model: PackedModel) -> None:
    """Assert that bits do not depend on the number of threads."""
    step = [chain(0, 0, TEXT[:50], keep_last=True), chain(1, 0, TEXT[:3], keep_last=True)]
    alone, before = model.forward(step).clone(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(model.forward(step), alone)
    finally:
        torch.set_num_threads(before)
