"""Statistics of drafted candidates, sorted into bins."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from worker.engine.cpu.kernels import address
from worker.engine.host.nodes import FloatArray


class BinLayout(ctypes.Structure):
    """`bins_t` of kernels.c."""

    _fields_ = (
        ("edges", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("edge_count", "sources", "depth_classes", "count")),
        *((name, ctypes.c_void_p) for name in ("accepted", "expected")),
    )


class Bins:
    """Accepted and expected tokens by sampling (greedy or not), source, depth and probability, as flat tables."""

    def __init__(self, edges: FloatArray, sources: int, depth_classes: int, prior: float) -> None:
        """Start every bin with `prior` accepted of as many expected tokens; `edges` divide the probabilities."""
        self.edges, self.sources, self.depth_classes = edges, sources, depth_classes
        self.shape = (2, sources, depth_classes, len(edges) + 1)
        self.count = int(np.prod(self.shape))
        self.accepted, self.expected = np.full(self.count, prior), np.full(self.count, prior)
        self._lay_out()

    def _lay_out(self) -> None:
        """Note the addresses of the tables, which are changed in place."""
        edges, accepted, expected = (address(table) for table in (self.edges, self.accepted, self.expected))
        numbers = (len(self.edges), self.sources, self.depth_classes, self.count)
        self._layout = BinLayout(edges, *numbers, accepted, expected)
        self.layout = ctypes.addressof(self._layout)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has, too: all but the addresses."""
        return {name: value for name, value in vars(self).items() if name not in ("_layout", "layout")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another."""
        vars(self).update(state)
        self._lay_out()
