"""Draft trees of a whole batch, as flat arrays.

A node's value is P(the target reaches it and accepts it): the product of the conditional probabilities on its path, the
p-hat of OPT-Tree (arXiv 2406.17276, section 3). By linearity, the expected number of accepted draft tokens E(A) is the
sum of the values of a tree's nodes. That is exact for sample-and-match verification (`verifier`) with the right
probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from worker.engine.host.nodes import FloatArray, Nodes
from worker.engine.host.tree_kernels import tree_kernels
from worker.engine.sampling.parameters import Adjustments, ParameterArray
from worker.engine.sampling.penalties import NONE_SEEN, adjustments_of
from worker.engine.sampling.sampling import adjust
from worker.engine.segments import BoolArray, IntArray, KvMoves, Segments, ranges
from worker.engine.sequence import Sequence
from worker.engine.speculation.sequence_columns import SequenceColumns
from worker.engine.speculation.tree_masks import TreeMasks

SOURCES = 3  # of candidates at most, each with statistics of its own
_NO_PAIRS: IntArray = np.empty((0, 2), np.int64)
_SPARE_NODES = 64  # memory for draft nodes from the start; more costs an allocation when it is needed


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a drafter offers below each node of a frontier: probability 0 marks an empty entry."""

    tokens: IntArray  # [frontier, k]
    probabilities: FloatArray  # [frontier, k] P(the target draws this token here | it reached the node)
    source: IntArray | None = None  # [frontier, k] the source of each, below SOURCES; None: one source for all


class Forest(Nodes):
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
        # A forced token is certain. Drafts below it are worth no more, or they would rank before their parent.
        super().__init__(count, 4 * count + _SPARE_NODES, min(tree_discount, 1.0))
        tree_kernels().plant(self, np.array([s.ids[-1] for s in self.sequences], np.int64), tree_discount)
        self.masks = masks

    @property
    def roots(self) -> IntArray:
        """Nodes of the roots: one per sequence, in the order of the sequences."""
        return np.arange(len(self.sequences))

    @property
    def drafts_nothing(self) -> bool:
        """True if the trees have no nodes below their roots but those that grammars force."""
        return self.size == self.trees or (self.masks is not None and bool(self.forced[self.trees :].all()))

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

    @cached_property
    def slots(self) -> IntArray:
        """KV slot of each tree's sequence."""
        return np.array([s.slot for s in self.sequences], np.int64)

    @cached_property
    def remaining(self) -> IntArray:
        """Tokens that may still be emitted for each tree."""
        return self.columns.max_lengths - self.lengths

    def add_layer(self, frontier: IntArray, candidates: Candidates, min_value: float = 0.0) -> IntArray:
        """Add the candidates with a value above `min_value` below the frontier; return the indices of the new nodes."""
        first = self.size
        tree_kernels().add_layer(self, frontier, candidates, min_value)
        if self.masks is not None:
            self.masks.add(self.tree[first:], self.token[first:])
        return np.arange(first, self.size)

    def expandable(self, nodes: IntArray) -> IntArray:
        """Drop nodes whose children could never be emitted: after an end-of-sequence token, or beyond `max_tokens`."""
        return tree_kernels().expandable(self, nodes, self.columns.end_keys, self.remaining)

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
        trees = np.repeat(self.tree[above], counts)
        self.append(trees, parents, tokens, depths, np.repeat(values, counts), forced=True)
        self.masks.add(trees, tokens)
        self.masks.learn(added.tolist(), [one for found in forced.values() for one in found.allowed[1:]])
        ends: IntArray = added[counts.cumsum() - 1]
        return nodes, ends[[found.open for found in forced.values()]]

    def ranking(self) -> IntArray:
        """Return the draft nodes, highest value first; parents precede their children.

        Ties go to the shallower node, then to the sequence with most tokens left: a batch that drains to one sequence
        is inefficient.
        """
        return tree_kernels().ranking(self, self.remaining)

    def best(self, per_tree: int) -> BoolArray:
        """Mark the `per_tree` best draft nodes of every tree, and the roots: T_opt of OPT-Tree (section 3).

        A child is worth no more than its parent, so the best nodes form a tree, and no tree of that size has a higher
        E(A).
        """
        return tree_kernels().best(self, per_tree)

    def summary(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Return the draft nodes, the depth and E(A) of each tree [sequences]: the expected accepted draft tokens."""
        if self.size == self.trees:
            return self.columns.zeros, self.columns.zeros, self.columns.zeros.view(np.float64)
        return tree_kernels().summary(self)

    def forced_nodes(self) -> IntArray:
        """Return the nodes of each tree [sequences] that grammars force."""
        if self.masks is None:
            return self.columns.zeros
        return np.bincount(self.tree[self.forced], minlength=self.trees)

    def expected(self, kept: BoolArray) -> FloatArray:
        """Return E(A) per tree, [sequences], of the kept nodes."""
        return tree_kernels().expected(self, kept)

    def pruned(self, kept: BoolArray) -> Forest:
        """Return the kept nodes as a new forest in the same order; `kept` must hold every root."""
        forest = self.emptied()
        tree_kernels().prune(self, kept, forest)
        forest.masks = None if self.masks is None else self.masks.pruned(np.flatnonzero(kept))
        return forest

    def emptied(self) -> Forest:
        """Return a forest of the same sequences with memory for as many nodes, which have no content yet."""
        forest = Forest.__new__(Forest)
        vars(forest).update(vars(self))
        forest.allocate(self.size)
        return forest

    def nodes_of(self, tree: int) -> IntArray:
        """Return the nodes of one tree: root first, parents before children."""
        return np.flatnonzero(self.tree == tree)

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
        if not self.parameters["adjusted"][trees].any():
            return None
        owners = [self.sequences[tree] for tree in trees]
        positions = (self.lengths[trees] + self.depth[nodes]).tolist()
        seen = [
            sequence.seen(self.path(int(node))) if sequence.sampling.penalized else NONE_SEEN
            for sequence, node in zip(owners, nodes, strict=True)
        ]
        return adjustments_of([s.bias(position) for s, position in zip(owners, positions, strict=True)], seen)

    def segments(self, trees: int) -> tuple[Segments, IntArray]:
        """Return the rows of the first `trees` trees for the target, in order of their slots, and the row of each node.

        It is 0 for nodes of other trees. Roots are among them: their KV entries are not yet written.
        """
        return tree_kernels().tree_rows(self, trees, self.slots, self.lengths)

    def moves(self, counts: IntArray, visited: IntArray) -> KvMoves:
        """Return the moves that bring the accepted nodes of each tree behind its root: see `AcceptedPaths`."""
        return tree_kernels().moves(self, counts, visited, self.slots, self.lengths)

    def drawn_ranks(self, counts: IntArray, visited: IntArray, emitted: IntArray) -> tuple[IntArray, IntArray]:
        """Return (number of children, rank of the drawn child) of the visited nodes with children, as far as emitted.

        First how many each tree has [trees], then all of them [entries, 2]. Rank -1: no child was drawn. Draws that
        were cut off at the end of the sequence are left out, and those of tokens that a grammar forces.
        """
        if self.size == self.trees:
            return self.columns.zeros, _NO_PAIRS
        return tree_kernels().drawn_ranks(self, counts, visited, emitted)
