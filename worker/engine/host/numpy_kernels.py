"""The host's work on draft trees in NumPy: the reference of `kernels.c`, which computes the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from worker.engine.host.bins import Bins
from worker.engine.host.nodes import END_SHIFT, FloatArray, Nodes
from worker.engine.segments import BoolArray, IntArray, KvMoves, Segments, ranges

if TYPE_CHECKING:
    from worker.engine.speculation.draft_tree import Candidates


class NumpyKernels:
    """`TreeKernels` without a C compiler."""

    def plant(self, nodes: Nodes, tokens: IntArray, value: float) -> None:
        """Write the roots."""
        nodes.tree[:], nodes.parent[:], nodes.depth[:], nodes.forced[:] = np.arange(nodes.trees), -1, 0, False
        nodes.token[:], nodes.value[:] = tokens, value

    def add_layer(self, nodes: Nodes, frontier: IntArray, offered: Candidates, min_value: float) -> None:
        """Add the offered with a value above `min_value` below the frontier."""
        certain = nodes.forced[frontier] & (nodes.value[frontier] == 1.0)
        values = np.where(certain, nodes.discount, nodes.value[frontier])[:, None] * offered.probabilities
        rows, ranks = np.nonzero(values > min_value)
        parents, tokens = frontier[rows], offered.tokens[rows, ranks]
        nodes.append(nodes.tree[parents], parents, tokens, nodes.depth[parents] + 1, values[rows, ranks], forced=False)

    def expandable(self, nodes: Nodes, some: IntArray, ends: tuple[IntArray, IntArray], left: IntArray) -> IntArray:
        """Return those of the nodes whose children could be emitted."""
        (groups, keys), trees, depths = ends, nodes.tree[some], nodes.depth[some]
        ended = np.isin(groups[trees] << END_SHIFT | nodes.token[some], keys) & (depths > 0)
        kept: IntArray = some[~ended & (depths + 2 <= left[trees])]
        return kept

    def ranking(self, nodes: Nodes, left: IntArray) -> IntArray:
        """Return the draft nodes by value, depth and tokens left."""
        roots = nodes.trees
        keys = (-left[nodes.tree[roots:]], nodes.depth[roots:], -nodes.value[roots:])
        return roots + np.lexsort(keys)  # stable: then by node

    def best(self, nodes: Nodes, per_tree: int) -> BoolArray:
        """Mark the best draft nodes of every tree, and the roots."""
        roots = nodes.trees
        counts = np.bincount(nodes.tree[roots:], minlength=roots)
        if counts.max(initial=0) <= per_tree:
            return np.ones(nodes.size, np.bool_)
        by_tree = np.lexsort((nodes.depth[roots:], -nodes.value[roots:], nodes.tree[roots:]))
        rank = ranges(np.zeros(roots, np.int64), counts)
        kept = np.zeros(nodes.size, np.bool_)
        kept[:roots] = True
        kept[roots + by_tree[rank < per_tree]] = True
        return kept

    def expected(self, nodes: Nodes, kept: BoolArray | None) -> FloatArray:
        """Return the sum of the values of each tree's draft nodes."""
        roots = nodes.trees
        draft = roots + np.flatnonzero(kept[roots:]) if kept is not None else slice(roots, None)
        sums = np.bincount(nodes.tree[draft], weights=nodes.value[draft], minlength=roots)
        return sums.astype(np.float64)  # of no nodes at all, bincount returns integers

    def summary(self, nodes: Nodes) -> tuple[IntArray, IntArray, FloatArray]:
        """Return the draft nodes, the depth and the sum of the values of each tree."""
        roots = nodes.trees
        depths = np.zeros(roots, np.int64)
        np.maximum.at(depths, nodes.tree[roots:], nodes.depth[roots:])
        return np.bincount(nodes.tree[roots:], minlength=roots), depths, self.expected(nodes, None)

    def prune(self, nodes: Nodes, kept: BoolArray, target: Nodes) -> None:
        """Copy the kept nodes to `target`, which has memory for them."""
        order = np.flatnonzero(kept)
        index = np.full(nodes.size, -1)
        index[order] = np.arange(len(order))
        target.resize(len(order))
        target.tree[:], target.token[:] = nodes.tree[order], nodes.token[order]
        target.depth[:], target.value[:], target.forced[:] = nodes.depth[order], nodes.value[order], nodes.forced[order]
        target.parent[:] = np.where(nodes.parent[order] >= 0, index[nodes.parent[order]], -1)
        assert (target.parent[nodes.trees :] >= 0).all(), "a kept node lost its parent"

    def tree_rows(self, nodes: Nodes, trees: int, slots: IntArray, lengths: IntArray) -> tuple[Segments, IntArray]:
        """Return the rows of the first trees in order of their slots, and the row of each node."""
        order = np.argsort(slots[:trees], kind="stable")
        rank = np.full(nodes.trees, trees)
        rank[order] = np.arange(trees)
        counts = np.bincount(nodes.tree, minlength=nodes.trees)[order]
        rows = np.argsort(rank[nodes.tree], kind="stable")[: counts.sum()]
        prefixes = lengths[order] - 1
        visible_counts, visible = _ancestors(nodes, rows, counts)
        segments = Segments(
            slots=slots[order],
            prefixes=prefixes,
            starts=prefixes,
            counts=counts,
            chains=counts == 1,
            ids=nodes.token[rows],
            positions=np.repeat(prefixes, counts) + nodes.depth[rows],
            kept=np.arange(len(rows)),
            kept_counts=counts,
            visible_counts=visible_counts,
            visible=visible,
        )
        places = np.zeros(nodes.size, np.int64)
        places[rows] = np.arange(len(rows))
        return segments, places

    def matching_children(self, nodes: Nodes, drawn: IntArray) -> IntArray:
        """Return the child of each node that has the token drawn there; -1: none."""
        roots = nodes.trees
        child = np.full(nodes.size, -1)
        parents = nodes.parent[roots:]
        matching = np.flatnonzero(drawn[parents] == nodes.token[roots:])
        child[parents[matching]] = roots + matching
        return child

    def paths(self, nodes: Nodes, drawn: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Return the accepted nodes of each tree, the visited nodes tree after tree, and the tokens drawn there."""
        child = self.matching_children(nodes, drawn)
        moving, steps = np.arange(nodes.trees), []
        while len(moving):
            steps.append(moving)
            moving = child[moving]
            moving = moving[moving >= 0]
        visited = np.concatenate([moving, *steps])
        visited = visited[np.argsort(nodes.tree[visited], kind="stable")]
        return np.bincount(nodes.tree[visited], minlength=nodes.trees) - 1, visited, drawn[visited]

    def moves(self, nodes: Nodes, counts: IntArray, visited: IntArray, slots: IntArray, lengths: IntArray) -> KvMoves:
        """Return the moves that bring the accepted nodes of each tree behind its root."""
        roots = lengths - 1  # KV indices
        draft_nodes = visited[visited >= nodes.trees]
        places = _places(nodes)[draft_nodes]
        first_place = ranges(np.ones_like(counts), counts)  # where each of them goes
        trees = nodes.tree[draft_nodes]
        out_of_place = np.bincount(trees[places != first_place], minlength=nodes.trees) > 0
        moved = out_of_place[trees]
        return KvMoves(
            slots[out_of_place], lengths[out_of_place], counts[out_of_place], roots[trees[moved]] + places[moved]
        )

    def drawn_ranks(
        self, nodes: Nodes, counts: IntArray, visited: IntArray, emitted: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Return (number of children, rank of the drawn child) of the visited nodes that have children."""
        rank, children = siblings(nodes)
        trees = nodes.tree[visited]
        drawn = np.append(rank[visited[1:]], -1)  # the next visited node was drawn, but at the end of a path
        drawn[(counts + 1).cumsum() - 1] = -1
        depth = ranges(np.zeros(nodes.trees, np.int64), counts + 1)
        reached = np.where(emitted >= counts, counts + 1, emitted)  # visited nodes that count
        children[nodes.parent[nodes.forced]] = 0  # they were not drafted
        told = (children[visited] > 0) & (depth < reached[trees])
        pairs = np.stack([children[visited[told]], drawn[told]], axis=1)
        return np.bincount(trees[told], minlength=nodes.trees), pairs

    def corrected(
        self, nodes: Nodes, frontier: IntArray, offered: Candidates, sampled: BoolArray, bins: Bins, limit: float
    ) -> FloatArray:
        """Return the probabilities of the offered times accepted over expected tokens of their bins."""
        ratio = (bins.accepted / bins.expected)[_bins(nodes, frontier, offered, sampled, bins)]
        probabilities: FloatArray = np.minimum(offered.probabilities * ratio, limit)
        return probabilities

    def drawn_at(
        self, nodes: Nodes, kept: IntArray, visited: IntArray, tokens: IntArray, frontier: IntArray
    ) -> IntArray:
        """Return the token drawn at each node of the frontier; -1: none was."""
        drawn = np.full(nodes.size, -1)
        drawn[kept[visited]] = tokens
        found: IntArray = drawn[frontier]
        return found

    def decay(self, bins: Bins, weight: float, prior: float) -> None:
        """Decay all counts towards the prior."""
        for table in (bins.accepted, bins.expected):
            table *= weight
            table += prior * (1.0 - weight)

    def count_accepted(
        self, nodes: Nodes, frontier: IntArray, offered: Candidates, sampled: BoolArray, bins: Bins, drawn: IntArray
    ) -> None:
        """Add the offered below the nodes whose drawn token is known to their bins."""
        known = np.flatnonzero(drawn >= 0)
        index = _bins(nodes, frontier, offered, sampled, bins)[known].ravel()
        probabilities = offered.probabilities[known]
        accepted = (offered.tokens[known] == drawn[known, None]) & (probabilities > 0.0)
        bins.accepted += np.bincount(index, accepted.ravel(), minlength=bins.count)
        bins.expected += np.bincount(index, probabilities.ravel(), minlength=bins.count)


def siblings(nodes: Nodes) -> tuple[IntArray, IntArray]:
    """Return for each node its rank among its siblings, 0 being the most likely, and how many children it has.

    Equal siblings rank in the order in which they were drafted.
    """
    roots, parents = nodes.trees, nodes.parent[nodes.trees :]
    children = np.bincount(parents, minlength=nodes.size)
    order = np.lexsort((-nodes.value[roots:], parents))
    starts = children.cumsum() - children
    rank = np.zeros(nodes.size, np.int64)
    rank[roots + order] = np.arange(len(order)) - starts[parents[order]]
    return rank, children


def _places(nodes: Nodes) -> IntArray:
    """Return the place of each node among the nodes of its tree, the root being 0."""
    order = np.argsort(nodes.tree, kind="stable")
    places = np.empty(nodes.size, np.int64)
    places[order] = ranges(np.zeros(nodes.trees, np.int64), np.bincount(nodes.tree))
    return places


def _ancestors(nodes: Nodes, rows: IntArray, counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return how many nodes each of `rows` sees in its tree, and which: its ancestors and itself, by depth.

    They are named by their place in the tree. A root alone sees nothing but its prefix: it is a chain.
    """
    depth = nodes.depth[rows]
    seen_counts = np.where(np.repeat(counts > 1, counts), depth + 1, 0)
    if not seen_counts.any():
        return seen_counts, seen_counts[:0]
    row_of = np.empty(nodes.size, np.int64)
    row_of[rows] = np.arange(len(rows))
    seen = np.empty((len(rows), int(depth.max()) + 1), np.int64)  # of each row, by depth
    seen[np.arange(len(rows)), depth] = ranges(np.zeros(len(counts), np.int64), counts)
    for level in range(1, seen.shape[1]):
        some = np.flatnonzero(depth == level)
        seen[some, :level] = seen[row_of[nodes.parent[rows[some]]], :level]
    return seen_counts, seen[np.arange(seen.shape[1]) < seen_counts[:, None]]


def _bins(nodes: Nodes, frontier: IntArray, offered: Candidates, sampled: BoolArray, bins: Bins) -> IntArray:
    """Return the bin of each candidate [frontier, k]."""
    *_, depths, width = bins.shape
    depth = np.minimum(nodes.depth[frontier], depths - 1)
    row = sampled[nodes.tree[frontier]] * (bins.sources * depths) + depth
    index = np.searchsorted(bins.edges, offered.probabilities) + (row * width)[:, None]
    if offered.source is not None:
        index += offered.source * (depths * width)
    return index
