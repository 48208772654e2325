"""Verify draft trees: keep the path on which every draft token is the target's own draw.

Sample and match: at each node the target draws its token as plain decoding would, under the mask of the node's own path
if a grammar binds it, and the draft is accepted where it is equal. So texts follow exactly the target's law, and a
seeded text is the one that plain decoding writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.engine.host.tree_kernels import tree_kernels
from worker.engine.sampling.sampling import argmax, draw
from worker.engine.segments import BoolArray, IntArray
from worker.engine.speculation.draft_tree import Forest


@dataclass(frozen=True, slots=True, eq=False)
class AcceptedPaths:
    """What the target accepted of every tree, as arrays: tree after tree, each path from its root down."""

    counts: IntArray  # [trees] accepted draft nodes
    visited: IntArray  # [trees + accepted nodes] the root, then the accepted nodes in order of depth
    drawn: IntArray  # [trees + accepted nodes] the target's own token at each; -1: NaN logits, or a grammar that failed

    @property
    def firsts(self) -> IntArray:
        """Index of each tree's root in `visited` [trees]."""
        ends: IntArray = (self.counts + 1).cumsum()
        return ends - self.counts - 1

    @property
    def bonus(self) -> IntArray:
        """The target's token after the accepted path [trees]."""
        tokens: IntArray = self.drawn[self.firsts + self.counts]
        return tokens

    def path(self, tree: int) -> IntArray:
        """Return the accepted nodes of a tree, in order of depth."""
        first = int(self.firsts[tree]) + 1
        return self.visited[first : first + int(self.counts[tree])]


def walk(forest: Forest, logits: Tensor, rows: IntArray) -> AcceptedPaths:
    """Walk every tree of the batch along the target's draws.

    `rows[node]` is the node's row in `logits` [rows, vocab]. Greedy trees share one argmax and one transfer. Trees with
    noise, penalties or a grammar draw lazily, only on the rows that they reach: one round per depth, and one for all
    tokens that a grammar forces one after the other. On a GPU, where a round is a transfer that the host waits for,
    every row is drawn at once.
    """
    if forest.masks is None and forest.columns.all_argmax:
        return AcceptedPaths(*tree_kernels().paths(forest, argmax(logits)[rows]))
    lazy = ~forest.columns.argmax
    if forest.masks is not None:
        forest.masks.finish()
        lazy |= forest.masks.constrained
    if not lazy.any():
        drawn = argmax(logits)[rows]
    elif _draws_at_once(logits):
        drawn = _draw_at(np.arange(forest.size), forest, logits, rows)
    else:
        drawn = _drawn_lazily(forest, logits, rows, lazy)
    return AcceptedPaths(*tree_kernels().paths(forest, drawn))


def _drawn_lazily(forest: Forest, logits: Tensor, rows: IntArray, lazy: BoolArray) -> IntArray:
    """Return the target's token at each node [nodes]; of `lazy` trees [trees] only at those that the walk visits."""
    drawn = np.full(forest.size, _UNKNOWN)
    if not lazy.all():
        drawn = np.where(lazy[forest.tree], _UNKNOWN, argmax(logits)[rows])
    moving = np.flatnonzero(lazy)  # the nodes that the walks have come to
    while len(moving):
        undrawn = moving[drawn[moving] == _UNKNOWN]
        if len(undrawn):
            undrawn = _with_forced(undrawn, forest)
            drawn[undrawn] = _draw_at(undrawn, forest, logits, rows)
        moving = tree_kernels().matching_children(forest, drawn)[moving]
        moving = moving[moving >= 0]
    return drawn


_UNKNOWN = -2  # no token, and not NaN's -1


def _draws_at_once(logits: Tensor) -> bool:
    return logits.device.type == "cuda"


def _with_forced(nodes: IntArray, forest: Forest) -> IntArray:
    """Return nodes and the forced ones below them, which the walk will come to: they are drawn together."""
    if forest.masks is None:
        return nodes
    begins = forest.forced & ~forest.forced[forest.parent]  # of a chain: its nodes follow each other
    first = np.maximum.accumulate(np.where(begins, np.arange(forest.size), 0))
    reached = np.zeros(forest.size, np.bool_)
    reached[nodes] = True
    return np.flatnonzero(reached | forest.forced & reached[forest.parent[first]])


def _draw_at(nodes: IntArray, forest: Forest, logits: Tensor, rows: IntArray) -> IntArray:
    """Return the target's token at each node. Those that a grammar binds are drawn apart: others need no mask."""
    if forest.masks is None:
        return _draw(nodes, forest, logits, rows)
    bound, masks = forest.masks.masks(nodes)
    if not len(bound):
        return _draw(nodes, forest, logits, rows)
    drawn = np.empty(len(nodes), np.int64)
    drawn[bound] = _draw(nodes[bound], forest, logits, rows, torch.from_numpy(masks))
    free = np.setdiff1d(np.arange(len(nodes)), bound)
    if len(free):
        drawn[free] = _draw(nodes[free], forest, logits, rows)
    return drawn


def _draw(nodes: IntArray, forest: Forest, logits: Tensor, rows: IntArray, masks: Tensor | None = None) -> IntArray:
    trees = forest.tree[nodes]
    positions = forest.lengths[trees] + forest.depth[nodes]
    return draw(logits, forest.parameters[trees], positions, rows[nodes], forest.adjustments(nodes), masks)
