"""What grammars allow at the nodes of draft trees: each path has its own state.

The masks of the roots are computed between steps, those of nodes to expand before they are expanded, and all others
while the target's forward runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from worker.engine.grammar.constraint import Allowed, Stretch
from worker.engine.grammar.constraints import Constraints, Stretches
from worker.engine.segments import BoolArray, IntArray
from worker.engine.speculation.sequence_columns import SequenceColumns

if TYPE_CHECKING:
    from worker.engine.speculation.draft_tree import Candidates, Forest

_FREE, _UNKNOWN = -1, -2  # every token is allowed; what is allowed was not computed yet


class TreeMasks:
    """The masks of one forest. Trees of sequences without a grammar have none."""

    def __init__(self, columns: SequenceColumns, constraints: Constraints) -> None:
        """Start with the roots."""
        self.max_forced = constraints.max_forced
        self.constrained: BoolArray = columns.constrained  # [trees]
        self._columns = columns
        self._constraints = constraints
        self._index: IntArray = np.where(self.constrained, _UNKNOWN, _FREE)  # [nodes] in `_found`, or a constant
        self._found: list[Allowed] = []
        self._started: list[tuple[Stretches, IntArray]] = []  # results to come, and their nodes

    def add(self, trees: IntArray, tokens: IntArray) -> None:
        """Add nodes. What follows an end of sequence is not emitted, so it needs no mask."""
        bound = self.constrained[trees] & ~self._columns.ends(trees, tokens)
        self._index = np.concatenate([self._index, np.where(bound, _UNKNOWN, _FREE)])

    def pruned(self, order: IntArray) -> TreeMasks:
        """Return the masks of the nodes of a pruned forest."""
        masks = copy(self)
        masks._index = self._index[order]
        return masks

    def root(self, tree: int) -> Stretch:
        """Return what is allowed and forced after a root; wait for it."""
        return self._constraints.newest(self._columns.sequences[tree])

    def stretches(self, forest: Forest, nodes: IntArray) -> dict[int, Stretch]:
        """Return what is allowed and forced below those of `nodes` that a grammar binds; wait for it."""
        unknown = nodes[self._index[nodes] == _UNKNOWN]
        is_root = unknown < len(self._columns.sequences)
        found = {root: self.root(root) for root in unknown[is_root].tolist()}
        inner = unknown[~is_root]
        limits = np.minimum(forest.remaining[forest.tree[inner]] - forest.depth[inner] - 1, self.max_forced)
        for future, some in self._start(forest, inner, limits):
            found.update(zip(some.tolist(), future.result(), strict=True))
        for node, stretch in found.items():
            self.learn([node], stretch.allowed[:1])
        return found

    def learn(self, nodes: Iterable[int], allowed: Iterable[Allowed]) -> None:
        """Record what is allowed after nodes."""
        for node, one in zip(nodes, allowed, strict=True):
            self._index[node] = _FREE if one.mask is None else len(self._found)
            if one.mask is not None:
                self._found.append(one)

    def start(self, forest: Forest) -> None:
        """Start to compute the masks of all nodes that have none, on other threads."""
        nodes = np.flatnonzero(self._index == _UNKNOWN)
        inner = nodes[nodes >= len(self._columns.sequences)]
        self._started = self._start(forest, inner, np.zeros(len(inner), np.int64))

    def finish(self) -> None:
        """Wait for the masks of all nodes."""
        for future, nodes in self._started:
            self.learn(nodes.tolist(), [stretch.allowed[0] for stretch in future.result()])
        self._started = []
        for tree in np.flatnonzero(self._index[: len(self._columns.sequences)] == _UNKNOWN).tolist():
            self.learn([tree], self.root(tree).allowed[:1])

    def masks(self, nodes: IntArray) -> tuple[IntArray, NDArray[np.int32]]:
        """Return the indices of those of `nodes` that a grammar binds, and their masks [bound, words]."""
        index = self._index[nodes]
        bound = np.flatnonzero(index >= 0)
        rows = [self._found[one].mask for one in index[bound].tolist()]
        return bound, np.stack(rows) if rows else np.empty((0, 0), np.int32)

    def failure(self, node: int) -> str:
        """Return why no token is allowed after a node; empty if some is."""
        index = int(self._index[node])
        return self._found[index].failure if index >= 0 else ""

    def permitted(self, frontier: IntArray, offered: Candidates) -> Candidates:
        """Return the candidates without those that a grammar forbids.

        The target draws none of these, so the probabilities of the others are divided by what is left.
        """
        bound, masks = self.masks(frontier)
        if not len(bound):
            return offered
        tokens, probabilities = offered.tokens[bound], offered.probabilities[bound]
        allowed = np.take_along_axis(masks, tokens // 32, axis=1) >> (tokens % 32).astype(np.int32) & 1 != 0
        kept = np.where(allowed, probabilities, 0.0)
        left = np.maximum(1.0 - (probabilities - kept).sum(axis=1), kept.sum(axis=1))
        changed = offered.probabilities.copy()
        changed[bound] = kept / np.maximum(left, np.finfo(np.float64).tiny)[:, None]
        return replace(offered, probabilities=np.minimum(changed, 1.0))

    def _start(self, forest: Forest, nodes: IntArray, limits: IntArray) -> list[tuple[Stretches, IntArray]]:
        """Start to compute the stretches of nodes below roots, each with a limit of forced tokens."""
        if not len(nodes):
            return []
        paths = [forest.path(node) for node in nodes.tolist()]
        trees = forest.tree[nodes].tolist()
        order = sorted(range(len(nodes)), key=lambda i: (trees[i], paths[i]))  # adjacent paths share most tokens
        walks = []
        for i in order:
            sequence = forest.sequences[trees[i]]
            walks.append((sequence.number, (self._constraints.constraint(sequence), paths[i], int(limits[i]))))
        ordered = nodes[order]
        return [(future, ordered[indices]) for future, indices in self._constraints.start(walks)]
