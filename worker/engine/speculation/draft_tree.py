"""Draft trees of a whole batch, as flat arrays.

A node's value is P(the target reaches it and accepts it): the product of the conditional probabilities on its path, the
p-hat of OPT-Tree (arXiv 2406.17276, section 3). By linearity, the expected number of accepted draft tokens E(A) is the
sum of the values of a tree's nodes. That is exact for sample-and-match verification (`verifier`) with the right
probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.sampling.parameters import Adjustments, ParameterArray
from worker.engine.sampling.penalties import NONE_SEEN, adjustments_of
from worker.engine.sampling.sampling import adjust
from worker.engine.segments import BoolArray, IntArray, Segments, ranges
from worker.engine.sequence import Sequence
from worker.engine.speculation.sequence_columns import SequenceColumns
from worker.engine.speculation.tree_masks import TreeMasks

FloatArray = NDArray[np.float64]


SOURCES = 3  # of candidates at most, each with statistics of its own


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a drafter offers below each node of a frontier: probability 0 marks an empty entry."""

    tokens: IntArray  # [frontier, k]
    probabilities: FloatArray  # [frontier, k] P(the target draws this token here | it reached the node)
    source: IntArray | None = None  # [frontier, k] the source of each, below SOURCES; None: one source for all


class Forest:
    """The draft trees of a batch. Nodes 0..len(sequences)-1 are the roots: each sequence's newest committed token."""

    def __init__(
        self,
        sequences: Seq[Sequence] | SequenceColumns,
        tree_discount: float = 1.0,
        masks: TreeMasks | None = None,
    ) -> None:
        """Start with the roots alone, which is plain decoding. All values are multiplied by `tree_discount`.

        `masks` are what grammars allow; None: no sequence has one.
        """
        self.columns = sequences if isinstance(sequences, SequenceColumns) else SequenceColumns(sequences)
        self.sequences = self.columns.sequences
        count = len(self.sequences)
        self.tree: IntArray = np.arange(count)
        self.parent: IntArray = np.full(count, -1)
        self.token: IntArray = np.array([s.ids[-1] for s in self.sequences], np.int64)
        self.depth: IntArray = np.zeros(count, np.int64)
        self.value: FloatArray = np.full(count, tree_discount)
        self.forced: BoolArray = np.zeros(count, np.bool_)  # nodes that a grammar forces below their parents
        self.masks = masks
        self._discount = tree_discount

    @property
    def roots(self) -> IntArray:
        """Nodes of the roots: one per sequence, in the order of the sequences."""
        return np.arange(len(self.sequences))

    @property
    def size(self) -> int:
        """Number of nodes, roots included."""
        return len(self.token)

    @property
    def sampled(self) -> BoolArray:
        """Which trees belong to sequences above temperature 0."""
        return self.columns.sampled

    @property
    def parameters(self) -> ParameterArray:
        """The sampling parameters [trees]."""
        return self.columns.parameters

    @cached_property
    def lengths(self) -> IntArray:
        """Tokens of each tree's sequence: the position of the token that is drawn at its root."""
        return np.array([len(s.ids) for s in self.sequences], np.int64)

    @property
    def remaining(self) -> IntArray:
        """Tokens that may still be emitted for each tree."""
        remaining: IntArray = self.columns.max_lengths - self.lengths
        return remaining

    def add_layer(self, frontier: IntArray, candidates: Candidates, min_value: float = 0.0) -> IntArray:
        """Add the candidates with a value above `min_value` below the frontier; return the indices of the new nodes."""
        values = self._drafted_value(frontier)[:, None] * candidates.probabilities
        rows, ranks = np.nonzero(values > min_value)
        parents = frontier[rows]
        return self._append(parents, self.depth[parents] + 1, candidates.tokens[rows, ranks], values[rows, ranks])

    def force(self, nodes: IntArray) -> tuple[IntArray, IntArray]:
        """Add the tokens that grammars force below nodes.

        Return the nodes below which a drafter may propose: those of `nodes`, and of the last ones of the chains that
        were added. A forced token is accepted if its parent is: its value is the parent's, and 1 below a root.
        """
        if self.masks is None:
            return nodes, nodes[:0]
        stretches = self.masks.stretches(self, nodes)
        closed = [node for node, found in stretches.items() if found.tokens or not found.open]
        forced = {node: found for node, found in stretches.items() if found.tokens}
        nodes = nodes[~np.isin(nodes, closed)] if closed else nodes
        if not forced:
            return nodes, nodes[:0]
        first, above = self.size, list(forced)
        counts = np.array([len(found.tokens) for found in forced.values()])
        within = ranges(np.zeros(len(above), np.int64), counts)  # place of each new node in its chain
        added = first + np.arange(int(counts.sum()))
        parents = np.where(within == 0, np.repeat(above, counts), added - 1)
        tokens = np.concatenate([found.tokens for found in forced.values()])
        values = np.where(np.array(above) < len(self.sequences), 1.0, self.value[above])
        depths = np.repeat(self.depth[above], counts) + within + 1
        self._append(parents, depths, tokens, np.repeat(values, counts), np.repeat(self.tree[above], counts))
        self.forced[first:] = True
        self.masks.learn(added.tolist(), [one for found in forced.values() for one in found.allowed[1:]])
        ends: IntArray = added[counts.cumsum() - 1]
        return nodes, ends[[found.open for found in forced.values()]]

    def _append(
        self, parents: IntArray, depths: IntArray, tokens: IntArray, values: FloatArray, trees: IntArray | None = None
    ) -> IntArray:
        """Add nodes; return their indices."""
        first = self.size
        trees = self.tree[parents] if trees is None else trees
        self.tree = np.concatenate([self.tree, trees])
        self.parent = np.concatenate([self.parent, parents])
        self.token = np.concatenate([self.token, tokens])
        self.depth = np.concatenate([self.depth, depths])
        self.value = np.concatenate([self.value, values])
        self.forced = np.concatenate([self.forced, np.zeros(len(tokens), np.bool_)])
        if self.masks is not None:
            self.masks.add(trees, tokens)
        return np.arange(first, self.size)

    def _drafted_value(self, nodes: IntArray) -> FloatArray:
        """Return what the children of nodes are worth if they are certain: below forced roots drafts are discounted."""
        if self.masks is None:
            return self.value[nodes]
        certain = self.forced[nodes] & (self.value[nodes] == 1.0)
        return np.where(certain, self._discount, self.value[nodes])

    def ranking(self) -> IntArray:
        """Return the draft nodes, highest value first; parents precede their children.

        Ties go to the shallower node, then to the sequence with most tokens left: a batch that drains to one sequence
        is inefficient.
        """
        roots = len(self.sequences)
        most_left = -self.remaining[self.tree[roots:]]
        return roots + np.lexsort((most_left, self.depth[roots:], -self.value[roots:]))  # stable: then by node

    def best(self, per_tree: int) -> BoolArray:
        """Mark the `per_tree` best draft nodes of every tree, and the roots: T_opt of OPT-Tree (section 3).

        A child is worth no more than its parent, so the best nodes form a tree, and no tree of that size has a higher
        E(A).
        """
        roots = len(self.sequences)
        counts = np.bincount(self.tree[roots:], minlength=roots)
        if counts.max(initial=0) <= per_tree:
            return np.ones(self.size, np.bool_)
        by_tree = np.lexsort((self.depth[roots:], -self.value[roots:], self.tree[roots:]))  # as `ranking` in each tree
        rank = ranges(np.zeros(roots, np.int64), counts)
        kept = np.zeros(self.size, np.bool_)
        kept[:roots] = True
        kept[roots + by_tree[rank < per_tree]] = True
        return kept

    def sizes(self) -> tuple[IntArray, IntArray]:
        """Return the draft nodes and the depth of each tree [sequences]."""
        roots = len(self.sequences)
        depths = np.zeros(roots, np.int64)
        np.maximum.at(depths, self.tree[roots:], self.depth[roots:])
        return np.bincount(self.tree[roots:], minlength=roots), depths

    def expected(self, kept: BoolArray | None = None) -> FloatArray:
        """Return E(A) per tree, [sequences]: the expected accepted draft tokens among the kept nodes; None: all."""
        roots = len(self.sequences)
        draft = roots + np.flatnonzero(kept[roots:]) if kept is not None else slice(roots, None)
        sums = np.bincount(self.tree[draft], weights=self.value[draft], minlength=roots)
        return sums.astype(np.float64)  # of no nodes at all, bincount returns integers

    def pruned(self, kept: BoolArray) -> Forest:
        """Return the kept nodes as a new forest in the same order; `kept` must hold every root."""
        order = np.flatnonzero(kept)
        index = np.full(self.size, -1)
        index[order] = np.arange(len(order))
        forest = copy(self)
        forest.tree, forest.token = self.tree[order], self.token[order]
        forest.depth, forest.value, forest.forced = self.depth[order], self.value[order], self.forced[order]
        forest.masks = None if self.masks is None else self.masks.pruned(order)
        forest.parent = np.where(self.parent[order] >= 0, index[self.parent[order]], -1)
        assert (forest.parent[len(self.sequences) :] >= 0).all(), "a kept node lost its parent"
        return forest

    def nodes_of(self, tree: int) -> IntArray:
        """Return the nodes of one tree: root first, parents before children."""
        return np.flatnonzero(self.tree == tree)

    def siblings(self) -> tuple[IntArray, IntArray]:
        """Return for each node its rank among its siblings, 0 being the most likely, and how many children it has.

        Equal siblings rank in the order in which they were drafted.
        """
        roots, parents = len(self.sequences), self.parent[len(self.sequences) :]
        children = np.bincount(parents, minlength=self.size)
        order = np.lexsort((-self.value[roots:], parents))
        starts = children.cumsum() - children
        rank = np.zeros(self.size, np.int64)
        rank[roots + order] = np.arange(len(order)) - starts[parents[order]]
        return rank, children

    def path(self, node: int) -> list[int]:
        """Return the tokens from below the root down to a node."""
        tokens: list[int] = []
        while self.parent[node] >= 0:
            tokens.append(int(self.token[node]))
            node = int(self.parent[node])
        return tokens[::-1]

    def adjusted(self, logits: Tensor, nodes: IntArray) -> Tensor:
        """Return the logits [nodes, vocab] of these nodes under penalties and bias, each along its own path."""
        adjustments = self.adjustments(nodes)
        if adjustments is None:
            return logits
        return adjust(logits, self.parameters[self.tree[nodes]], adjustments)

    def adjustments(self, nodes: IntArray) -> Adjustments | None:
        """Return what adjusts the logits of these nodes, each along its own path; None if nothing does."""
        trees = self.tree[nodes]
        adjusted = self.parameters["adjusted"][trees]
        if not adjusted.any():
            return None
        owners = [self.sequences[tree] for tree in trees]
        seen = [
            sequence.seen(self.path(int(node))) if some else NONE_SEEN
            for sequence, node, some in zip(owners, nodes, adjusted, strict=True)
        ]
        return adjustments_of([s.sampling for s in owners], seen)

    def segments(self, trees: int) -> tuple[Segments, IntArray]:
        """Return the rows of the first `trees` trees for the target, in order of their slots, and the node of each row.

        Roots are among them: their KV entries are not yet written.
        """
        slots = np.array([s.slot for s in self.sequences[:trees]], np.int64)
        prefixes = self.lengths[:trees] - 1
        order = np.argsort(slots, kind="stable")
        nodes, counts = order, np.ones(trees, np.int64)
        if self.size > len(self.sequences):
            rank = np.full(len(self.sequences), trees)
            rank[order] = np.arange(trees)
            counts = np.bincount(self.tree, minlength=len(self.sequences))[order]
            nodes = np.argsort(rank[self.tree], kind="stable")[: counts.sum()]
        depth = self.depth[nodes]
        prefixes = prefixes[order]
        visible_counts, visible = self._ancestors(nodes, counts)
        segments = Segments(
            slots=slots[order],
            prefixes=prefixes,
            starts=prefixes,
            counts=counts,
            chains=counts == 1,
            ids=self.token[nodes],
            positions=np.repeat(prefixes, counts) + depth,
            kept=np.arange(len(nodes)),
            kept_counts=counts,
            visible_counts=visible_counts,
            visible=visible,
        )
        return segments, nodes

    def _ancestors(self, nodes: IntArray, counts: IntArray) -> tuple[IntArray, IntArray]:
        """Return how many nodes each of `nodes` sees in its tree, and which: its ancestors and itself, by depth.

        `nodes` are those of several trees, `counts` of each, parents first. They are named by their place in the tree.
        A root alone sees nothing but its prefix: it is a chain.
        """
        depth = self.depth[nodes]
        seen_counts = np.where(np.repeat(counts > 1, counts), depth + 1, 0)
        if not seen_counts.any():
            return seen_counts, seen_counts[:0]
        row_of = np.empty(self.size, np.int64)
        row_of[nodes] = np.arange(len(nodes))
        seen = np.empty((len(nodes), int(depth.max()) + 1), np.int64)  # of each row, by depth
        seen[np.arange(len(nodes)), depth] = ranges(np.zeros(len(counts), np.int64), counts)
        for level in range(1, seen.shape[1]):
            rows = np.flatnonzero(depth == level)
            seen[rows, :level] = seen[row_of[self.parent[nodes[rows]]], :level]
        return seen_counts, seen[np.arange(seen.shape[1]) < seen_counts[:, None]]

    def places(self) -> IntArray:
        """Return the place of each node among the nodes of its tree, the root being 0 [nodes]."""
        order = np.argsort(self.tree, kind="stable")
        places = np.empty(self.size, np.int64)
        places[order] = ranges(np.zeros(len(self.sequences), np.int64), np.bincount(self.tree))
        return places
