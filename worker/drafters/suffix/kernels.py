"""What a suffix index computes: it reads tokens, and looks up what may follow. Compiled, and the same in Python."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from worker.drafters.suffix.memory import (
    CONTEXT,
    FOLLOWERS,
    MAX_COUNT,
    MAX_OFFERS,
    ORDERS,
    SHARE_EDGES,
    IndexMemory,
)
from worker.drafters.suffix.python_kernels import PythonSuffixKernels
from worker.engine.cpu.compiler import EXACT, library
from worker.engine.cpu.kernels import address, bound
from worker.engine.host.nodes import FloatArray, Nodes
from worker.engine.segments import IntArray

_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_CONSTANTS = {
    "CONTEXT": CONTEXT,
    "FOLLOWERS": FOLLOWERS,
    "MAX_ORDERS": len(ORDERS),
    "MAX_OFFERS": MAX_OFFERS,
    "MAX_COUNT": MAX_COUNT,
    "EDGES": len(SHARE_EDGES),
}


class SuffixKernels(Protocol):
    """Both implementations leave the same bits."""

    lookup_function: int  # address of `lookup` in suffix.c; 0: it is not compiled

    def read(
        self, memory: IndexMemory, rows: IntArray, counts: IntArray, tokens: IntArray, kinds: NDArray[np.uint8]
    ) -> None:
        """Read `tokens` with their `kinds` [sum of counts]: the next `counts` [n] of the texts `rows` [n]."""

    def lookup(
        self, memory: IndexMemory, rows: IntArray, nodes: Nodes, frontier: IntArray, width: int
    ) -> tuple[IntArray, FloatArray]:
        """Return what may follow the nodes `frontier` [n]: tokens and probabilities [n, width], the best first.

        `rows` [trees] are the texts of the trees.
        """


class CompiledSuffixKernels:
    """`SuffixKernels` in C. Calls keep the interpreter's lock: they take microseconds."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from suffix.c."""
        functions: Any = ctypes.PyDLL(compiled._name)
        self._read = bound(functions.read_tokens, *[_ADDRESS] * 3, _SIZE, *[_ADDRESS] * 2)
        self.lookup_function = ctypes.cast(functions.lookup, ctypes.c_void_p).value or 0
        self._lookup = bound(functions.lookup, *[_ADDRESS] * 6, _SIZE, _SIZE, *[_ADDRESS] * 2)

    def read(
        self, memory: IndexMemory, rows: IntArray, counts: IntArray, tokens: IntArray, kinds: NDArray[np.uint8]
    ) -> None:
        """Read the next tokens of some texts."""
        index = ctypes.addressof(memory.layout)
        self._read(index, address(rows), address(counts), len(rows), address(tokens), address(kinds))

    def lookup(
        self, memory: IndexMemory, rows: IntArray, nodes: Nodes, frontier: IntArray, width: int
    ) -> tuple[IntArray, FloatArray]:
        """Return what may follow the nodes of a frontier."""
        frontier = np.ascontiguousarray(frontier, np.int64)
        shape = len(frontier), width
        tokens, probabilities = np.empty(shape, np.int64), np.empty(shape, np.float64)
        columns = map(address, (rows, nodes.tree, nodes.parent, nodes.token, frontier))
        self._lookup(ctypes.addressof(memory.layout), *columns, *shape, address(tokens), address(probabilities))
        return tokens, probabilities


@cache
def suffix_kernels() -> SuffixKernels:
    """Return the compiled functions; those of Python without a C compiler."""
    constants = (f"-D{name}={value}" for name, value in _CONSTANTS.items())
    compiled = library(Path(__file__).with_name("suffix.c"), *EXACT, *constants)
    return PythonSuffixKernels() if compiled is None else CompiledSuffixKernels(compiled)
