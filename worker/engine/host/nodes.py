"""The nodes of draft trees as columns of one buffer, which compiled functions read by its address."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from worker.engine.cpu.kernels import address
from worker.engine.segments import BoolArray, IntArray

FloatArray = NDArray[np.float64]
END_SHIFT = 32  # an end-of-sequence key is group << END_SHIFT | token


class Layout(ctypes.Structure):
    """`buffer_t` of kernels.c: where the columns are."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("buffer", "forced")),
        *((name, ctypes.c_int64) for name in ("capacity", "trees", "size")),
        ("discount", ctypes.c_double),
    )


class Nodes:
    """The nodes of the trees of a batch. The first `trees` are the roots; parents precede their children.

    Columns are views that are made when they are asked for: compiled functions need none.
    """

    def __init__(self, trees: int, capacity: int, discount: float) -> None:
        """Allocate columns for `capacity` nodes; the roots have no content yet.

        Drafts below a node that a grammar forces with certainty have `discount` of its value.
        """
        self.trees, self.discount = trees, discount
        self.allocate(capacity)
        self.resize(trees)

    def allocate(self, capacity: int) -> None:
        """Take new memory for `capacity` nodes, without content."""
        self._buffer, self._forced = np.empty((5, capacity), np.int64), np.empty(capacity, np.bool_)
        self._layout = Layout(address(self._buffer), address(self._forced), capacity, self.trees, 0, self.discount)
        self.layout = ctypes.addressof(self._layout)

    @property
    def laid_out(self) -> int:
        """The number of nodes after a compiled function has added some."""
        return int(self._layout.size)

    def resize(self, size: int) -> None:
        """Let the columns have `size` nodes, at most the capacity."""
        self.size = self._layout.size = size

    @property
    def tree(self) -> IntArray:
        """Tree of each node [nodes], as are the other columns."""
        return self._buffer[0, : self.size]

    @property
    def parent(self) -> IntArray:
        """Parent; -1: a root."""
        return self._buffer[1, : self.size]

    @property
    def token(self) -> IntArray:
        """Token."""
        return self._buffer[2, : self.size]

    @property
    def depth(self) -> IntArray:
        """Depth; 0: a root."""
        return self._buffer[3, : self.size]

    @property
    def value(self) -> FloatArray:
        """P(the target reaches and accepts the node), as estimated."""
        return self._buffer[4, : self.size].view(np.float64)

    @property
    def forced(self) -> BoolArray:
        """True for a node that a grammar forces below its parent."""
        return self._forced[: self.size]

    def reserve(self, capacity: int) -> None:
        """Make the capacity at least `capacity`; the nodes keep their content."""
        if capacity > self._layout.capacity:
            held, forced, size = self._buffer, self._forced, self.size
            self.allocate(2 * capacity)
            self._buffer[:, :size], self._forced[:size] = held[:, :size], forced[:size]
            self.resize(size)

    def append(
        self,
        trees: IntArray,
        parents: IntArray,
        tokens: IntArray,
        depths: IntArray,
        values: FloatArray,
        *,
        forced: bool,
    ) -> None:
        """Add nodes below earlier ones or each other."""
        first = self.size
        self.reserve(first + len(parents))
        self.resize(first + len(parents))
        self.tree[first:], self.parent[first:], self.token[first:] = trees, parents, tokens
        self.depth[first:], self.value[first:], self.forced[first:] = depths, values, forced
