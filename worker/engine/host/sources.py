"""Candidates from compiled code, which trees can grow on without a return to Python."""

from __future__ import annotations

import ctypes
from typing import Final, Protocol

import numpy as np

from worker.engine.cpu.kernels import address, members
from worker.engine.host.nodes import FloatArray
from worker.engine.segments import IntArray

_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


class CompiledSource(Protocol):
    """Where compiled code finds the candidates of one step.

    `function` is the address of an `offer_t` of growth.c, which Python keeps loaded:

        void offer(void *context, const buffer_t *nodes, const i64 *frontier, i64 rows,
                   i64 *tokens, double *probabilities)

    It writes `width` candidates below each node of the frontier [rows]; probability 0 marks an empty entry. `buffer_t`
    is in trees.h. It runs under the interpreter's lock, calls no Python, and must not fail.
    """

    function: int
    context: int  # address of what the function reads; the source keeps it
    width: int  # candidates of a node


class SourceLayout(ctypes.Structure):
    """`source_t` of growth.c."""

    _fields_ = (
        *members("offer context", _ADDRESS),
        ("width", _SIZE),
        *members("tokens probabilities labels", _ADDRESS),
    )


class _Bigrams(ctypes.Structure):
    """`bigrams_t` of growth.c."""

    _fields_ = (*members("vocabulary width", _SIZE), *members("tokens probabilities", _ADDRESS))


class BigramSource:
    """Candidates that depend on the token above them alone: a table, for tests and benchmarks."""

    def __init__(self, function: int, tokens: IntArray, probabilities: FloatArray) -> None:
        """Offer `tokens` [vocabulary, width] with `probabilities`; `function` is the address of `offer_bigrams`."""
        self._tokens, self._probabilities = np.ascontiguousarray(tokens), np.ascontiguousarray(probabilities)
        sizes, tables = tokens.shape, map(address, (self._tokens, self._probabilities))
        self._layout = _Bigrams(*sizes, *tables)
        self.function, self.context, self.width = function, ctypes.addressof(self._layout), tokens.shape[1]


class _Lookups(ctypes.Structure):
    """`lookups_t` of growth.c."""

    _fields_ = (*members("lookup index rows", _ADDRESS), ("width", _SIZE))


class LookupSource:
    """Candidates that a function of another library looks up: see `lookup_t` of growth.c."""

    def __init__(self, function: int, lookup: int, index: int, rows: IntArray, width: int) -> None:
        """Look `width` candidates of a node up; `rows` [trees] say where the trees are in the `index`.

        `function` is the address of `offer_lookups`, `lookup` that of the function, `index` that of its first argument.
        """
        self._rows = rows
        self._layout = _Lookups(lookup, index, address(rows), width)
        self.function, self.context, self.width = function, ctypes.addressof(self._layout), width


NO_FUNCTION: Final = 0  # of a source whose candidates Python writes, layer by layer
