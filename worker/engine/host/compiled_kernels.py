"""Call the functions of kernels.c with arrays."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from worker.engine.cpu.kernels import address, bound
from worker.engine.host.bins import Bins
from worker.engine.host.nodes import FloatArray, Nodes
from worker.engine.segments import BoolArray, IntArray, KvMoves, Segments

if TYPE_CHECKING:
    from worker.engine.speculation.draft_tree import Candidates

_FEW_NODES = 64  # of a step, whose rows need no exact count of what they see
_SIZE, _ADDRESS, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "add_layer": ([_ADDRESS, _ADDRESS, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _REAL], _SIZE),
    "expandable": ([_ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS], _SIZE),
    "ranking": ([_ADDRESS] * 3, None),
    "best": ([_ADDRESS, _SIZE, _ADDRESS], None),
    "expected": ([_ADDRESS] * 3, None),
    "summary": ([_ADDRESS] * 4, None),
    "prune": ([_ADDRESS] * 3, _SIZE),
    "tree_rows": ([_ADDRESS, _SIZE, *[_ADDRESS] * 4], None),
    "matching_children": ([_ADDRESS] * 3, None),
    "paths": ([_ADDRESS] * 3, _SIZE),
    "moves": ([_ADDRESS] * 7, None),
    "drawn_ranks": ([_ADDRESS] * 5, _SIZE),
    "corrected": ([*[_ADDRESS] * 4, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _REAL, _ADDRESS], None),
    "plant": ([_ADDRESS, _ADDRESS, _REAL], None),
    "drawn_at": ([_ADDRESS] * 4 + [_SIZE, _ADDRESS, _SIZE, _ADDRESS], None),
    "decay": ([_ADDRESS, _REAL, _REAL], None),
    "count_accepted": ([*[_ADDRESS] * 4, _SIZE, _SIZE, *[_ADDRESS] * 4], None),
}


class CompiledKernels:
    """`TreeKernels` in C. Calls keep the interpreter's lock: they take microseconds, and share scratch memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from kernels.c."""
        compiled = ctypes.PyDLL(library._name)
        self._c = {
            name: bound(getattr(compiled, name), *arguments, result=result)
            for name, (arguments, result) in _FUNCTIONS.items()
        }

    def plant(self, nodes: Nodes, tokens: IntArray, value: float) -> None:
        """Write the roots."""
        self._c["plant"](nodes.layout, address(tokens), value)

    def add_layer(self, nodes: Nodes, frontier: IntArray, offered: Candidates, min_value: float) -> None:
        """Add the candidates with a value above `min_value` below the frontier."""
        tokens, probabilities = _ints(offered.tokens), _reals(offered.probabilities)
        frontier, (rows, width) = _ints(frontier), tokens.shape
        nodes.reserve(nodes.size + rows * width)
        given = (address(frontier), rows, width, address(tokens), address(probabilities), min_value)
        nodes.resize(self._c["add_layer"](nodes.layout, *given))

    def expandable(self, nodes: Nodes, some: IntArray, ends: tuple[IntArray, IntArray], left: IntArray) -> IntArray:
        """Return those of the nodes whose children could be emitted."""
        (groups, keys), found, some = ends, np.empty(len(some), np.int64), _ints(some)
        given = (address(some), len(some), address(groups), address(keys), len(keys), address(left), address(found))
        return found[: self._c["expandable"](nodes.layout, *given)]

    def ranking(self, nodes: Nodes, left: IntArray) -> IntArray:
        """Return the draft nodes by value, depth and tokens left."""
        ranked = np.empty(nodes.size - nodes.trees, np.int64)
        self._c["ranking"](nodes.layout, address(left), address(ranked))
        return ranked

    def best(self, nodes: Nodes, per_tree: int) -> BoolArray:
        """Mark the best draft nodes of every tree, and the roots."""
        kept = np.empty(nodes.size, np.bool_)
        self._c["best"](nodes.layout, per_tree, address(kept))
        return kept

    def expected(self, nodes: Nodes, kept: BoolArray | None) -> FloatArray:
        """Return the sum of the values of each tree's draft nodes."""
        sums = np.empty(nodes.trees, np.float64)
        self._c["expected"](nodes.layout, None if kept is None else address(kept), address(sums))
        return sums

    def summary(self, nodes: Nodes) -> tuple[IntArray, IntArray, FloatArray]:
        """Return the draft nodes, the depth and the sum of the values of each tree."""
        trees = nodes.trees
        out = np.empty((3, trees), np.int64)
        at = address(out)
        self._c["summary"](nodes.layout, at, at + 8 * trees, at + 16 * trees)
        return out[0], out[1], out[2].view(np.float64)

    def prune(self, nodes: Nodes, kept: BoolArray, target: Nodes) -> None:
        """Copy the kept nodes to `target`."""
        size = self._c["prune"](nodes.layout, address(kept), target.layout)
        assert size >= 0, "a kept node lost its parent"
        target.resize(size)

    def tree_rows(self, nodes: Nodes, trees: int, slots: IntArray, lengths: IntArray) -> tuple[Segments, IntArray]:
        """Return the rows of the first trees in order of their slots, and the row of each node."""
        size = nodes.size
        depth = size if size <= _FEW_NODES else int(nodes.depth.max(initial=0))  # at most
        seen = size * (depth + 1)
        out = np.empty(3 * trees + 5 * size + seen + 2, np.int64)
        given = (address(slots), address(lengths), address(out), address(out) + 8 * (len(out) - 2))
        self._c["tree_rows"](nodes.layout, trees, *given)
        rows, entries = out[-2:].tolist()
        order, prefixes, counts = out[: 3 * trees].reshape(3, trees)
        places, *columns = out[3 * trees : 3 * trees + 5 * size].reshape(5, size)
        tokens, positions, kept, seen_counts = (column[:rows] for column in columns) if rows < size else columns
        segments = Segments(
            slots=slots[order],
            prefixes=prefixes,
            starts=prefixes,
            counts=counts,
            chains=counts == 1,
            ids=tokens,
            positions=positions,
            kept=kept,
            kept_counts=counts,
            visible_counts=seen_counts,
            visible=out[3 * trees + 5 * size :][:entries],
        )
        return segments, places

    def matching_children(self, nodes: Nodes, drawn: IntArray) -> IntArray:
        """Return the child of each node that has the token drawn there; -1: none."""
        child, drawn = np.empty(nodes.size, np.int64), _ints(drawn)
        self._c["matching_children"](nodes.layout, address(drawn), address(child))
        return child

    def paths(self, nodes: Nodes, drawn: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Return the accepted nodes of each tree, the visited nodes tree after tree, and the tokens drawn there."""
        trees, size = nodes.trees, nodes.size
        out, drawn = np.empty(trees + 2 * size, np.int64), _ints(drawn)
        visited = self._c["paths"](nodes.layout, address(drawn), address(out))
        return out[:trees], out[trees : trees + visited], out[trees + size : trees + size + visited]

    def moves(self, nodes: Nodes, counts: IntArray, visited: IntArray, slots: IntArray, lengths: IntArray) -> KvMoves:
        """Return the moves that bring the accepted nodes of each tree behind its root."""
        trees = nodes.trees
        out, totals = np.empty(3 * trees + len(visited), np.int64), np.empty(2, np.int64)
        given = (counts, visited, slots, lengths, out, totals)
        self._c["moves"](nodes.layout, *map(address, given))
        moved, entries = totals.tolist()
        moved_slots, destinations, lengths = out[: 3 * trees].reshape(3, trees)[:, :moved]
        return KvMoves(moved_slots, destinations, lengths, out[3 * trees : 3 * trees + entries])

    def drawn_ranks(
        self, nodes: Nodes, counts: IntArray, visited: IntArray, emitted: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Return (number of children, rank of the drawn child) of the visited nodes that have children."""
        trees = nodes.trees
        out = np.empty(trees + 2 * len(visited), np.int64)
        found = self._c["drawn_ranks"](nodes.layout, *map(address, (counts, visited, emitted, out)))
        return out[:trees], out[trees : trees + 2 * found].reshape(found, 2)

    def corrected(
        self, nodes: Nodes, frontier: IntArray, offered: Candidates, sampled: BoolArray, bins: Bins, limit: float
    ) -> FloatArray:
        """Return the probabilities times accepted over expected tokens of their bins."""
        frontier, probabilities, source = _ints(frontier), _reals(offered.probabilities), _sources(offered)
        out = np.empty(probabilities.shape, np.float64)
        self._c["corrected"](
            nodes.layout,
            bins.layout,
            address(sampled),
            address(frontier),
            *probabilities.shape,
            address(probabilities),
            None if source is None else address(source),
            limit,
            address(out),
        )
        return out

    def drawn_at(
        self, nodes: Nodes, kept: IntArray, visited: IntArray, tokens: IntArray, frontier: IntArray
    ) -> IntArray:
        """Return the token drawn at each node of the frontier; -1: none was."""
        out = np.empty(len(frontier), np.int64)
        given = (address(kept), address(visited), address(tokens), len(visited))
        self._c["drawn_at"](nodes.layout, *given, address(frontier), len(frontier), address(out))
        return out

    def decay(self, bins: Bins, weight: float, prior: float) -> None:
        """Decay all counts towards the prior."""
        self._c["decay"](bins.layout, weight, prior)

    def count_accepted(
        self, nodes: Nodes, frontier: IntArray, offered: Candidates, sampled: BoolArray, bins: Bins, drawn: IntArray
    ) -> None:
        """Add the candidates below the nodes whose drawn token is known to their bins."""
        frontier, tokens, probabilities = _ints(frontier), _ints(offered.tokens), _reals(offered.probabilities)
        source, drawn = _sources(offered), _ints(drawn)
        self._c["count_accepted"](
            nodes.layout,
            bins.layout,
            address(sampled),
            address(frontier),
            *tokens.shape,
            address(tokens),
            address(probabilities),
            None if source is None else address(source),
            address(drawn),
        )


def _ints(array: IntArray) -> IntArray:
    """Return an array that C can read; the caller keeps it until the call returns."""
    return np.ascontiguousarray(array, np.int64)


def _reals(array: FloatArray) -> FloatArray:
    return np.ascontiguousarray(array, np.float64)


def _sources(offered: Candidates) -> IntArray | None:
    return None if offered.source is None else _ints(offered.source)
