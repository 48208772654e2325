"""What the host computes for the draft trees of a step: growth, selection, rows, accepted paths."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from worker.engine.cpu.compiler import EXACT, library
from worker.engine.host.bins import Bins
from worker.engine.host.compiled_kernels import CompiledKernels
from worker.engine.host.nodes import FloatArray, Nodes
from worker.engine.host.numpy_kernels import NumpyKernels
from worker.engine.segments import BoolArray, IntArray, KvMoves, Segments

if TYPE_CHECKING:
    from worker.engine.speculation.draft_tree import Candidates


class TreeKernels(Protocol):
    """Both implementations return the same bits."""

    def plant(self, nodes: Nodes, tokens: IntArray, value: float) -> None:
        """Write the roots of trees without further nodes: their tokens [trees] and their common value."""

    def add_layer(self, nodes: Nodes, frontier: IntArray, offered: Candidates, min_value: float) -> None:
        """Add the candidates [frontier, k] with a value above `min_value` below the frontier."""

    def expandable(self, nodes: Nodes, some: IntArray, ends: tuple[IntArray, IntArray], left: IntArray) -> IntArray:
        """Return those of the nodes whose children could be emitted: not after an end, nor beyond the tokens left.

        `ends` are the group of each tree [trees], and the sorted keys of all groups (`end_keys`); `left` [trees].
        """

    def ranking(self, nodes: Nodes, left: IntArray) -> IntArray:
        """Return the draft nodes by value, then depth, then tokens left [trees] in their trees."""

    def best(self, nodes: Nodes, per_tree: int) -> BoolArray:
        """Mark the `per_tree` best draft nodes of every tree, by value and depth, and the roots [nodes]."""

    def expected(self, nodes: Nodes, kept: BoolArray | None) -> FloatArray:
        """Return the sum of the values of each tree's draft nodes [trees]: of the kept ones, or all if None."""

    def summary(self, nodes: Nodes) -> tuple[IntArray, IntArray, FloatArray]:
        """Return the draft nodes, the depth and the sum of the values of each tree [trees]."""

    def prune(self, nodes: Nodes, kept: BoolArray, target: Nodes) -> None:
        """Copy the kept nodes to `target`, which has memory for all."""

    def tree_rows(self, nodes: Nodes, trees: int, slots: IntArray, lengths: IntArray) -> tuple[Segments, IntArray]:
        """Return the rows of the first trees, in order of their `slots` [trees], and the row of each node.

        It is 0 for nodes of other trees. `lengths` [trees] are the tokens of the sequences.
        """

    def matching_children(self, nodes: Nodes, drawn: IntArray) -> IntArray:
        """Return the child of each node that has the token `drawn` [nodes] there, of equals the last; -1: none."""

    def paths(self, nodes: Nodes, drawn: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Follow the drawn tokens [nodes] from every root.

        Return the number of accepted nodes [trees], the visited nodes tree after tree, and the tokens drawn there.
        """

    def moves(self, nodes: Nodes, counts: IntArray, visited: IntArray, slots: IntArray, lengths: IntArray) -> KvMoves:
        """Return the moves that bring the accepted nodes of each tree behind its root."""

    def drawn_ranks(
        self, nodes: Nodes, counts: IntArray, visited: IntArray, emitted: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Return (number of children, rank of the drawn child) of the visited nodes with children, as far as emitted.

        First how many each tree has [trees], then all of them [entries, 2]. Rank -1: no child was drawn. Equal siblings
        rank in the order in which they were drafted.
        """

    def corrected(
        self, nodes: Nodes, frontier: IntArray, offered: Candidates, sampled: BoolArray, bins: Bins, limit: float
    ) -> FloatArray:
        """Return the probabilities [frontier, k] times accepted over expected tokens of their bins, at most `limit`."""

    def drawn_at(
        self, nodes: Nodes, kept: IntArray, visited: IntArray, tokens: IntArray, frontier: IntArray
    ) -> IntArray:
        """Return the token drawn at each of the frontier's nodes; -1: none was.

        Node i of those that were verified is `kept[i]` of `nodes`; `visited` ones of them drew `tokens`.
        """

    def decay(self, bins: Bins, weight: float, prior: float) -> None:
        """Multiply all counts with `weight`, and add the rest of a whole `prior`."""

    def count_accepted(
        self, nodes: Nodes, frontier: IntArray, offered: Candidates, sampled: BoolArray, bins: Bins, drawn: IntArray
    ) -> None:
        """Add to their bins the candidates below the nodes whose `drawn` token [frontier] is known: not -1."""


@cache
def tree_kernels() -> TreeKernels:
    """Return the compiled functions; those of NumPy without a C compiler."""
    compiled = library(Path(__file__).with_name("kernels.c"), *EXACT)
    return NumpyKernels() if compiled is None else CompiledKernels(compiled)
