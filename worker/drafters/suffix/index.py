"""The suffix index: which tokens followed a context, in the texts of each group."""

from __future__ import annotations

import ctypes

import numpy as np

from worker.drafters.suffix.kernels import SuffixKernels, suffix_kernels
from worker.drafters.suffix.memory import INDEX_BYTES, IndexMemory
from worker.engine.host.growth import offer_function
from worker.engine.host.nodes import FloatArray, Nodes
from worker.engine.host.sources import CompiledSource, LookupSource
from worker.engine.segments import IntArray

WIDTH = 6  # candidates per node; more are rarely drawn, and cost time in every layer


class SuffixIndex:
    """An index of many groups: what is read in one is offered in no other."""

    def __init__(self, max_bytes: int = INDEX_BYTES, kernels: SuffixKernels | None = None) -> None:
        """Take at most `max_bytes` for what texts say, now and for ever."""
        self._kernels = suffix_kernels() if kernels is None else kernels
        self.memory = IndexMemory(max_bytes)
        self._free = list(range(len(self.memory.texts)))

    @property
    def num_texts(self) -> int:
        """Texts that were started and not ended."""
        return len(self.memory.texts) - len(self._free)

    @property
    def layout(self) -> int:
        """The address of `index_t`, for compiled callers of `lookup` in suffix.c."""
        return ctypes.addressof(self.memory.layout)

    def start(self, group: int, prompt: int, output: int) -> int:
        """Start a text and return its row. `prompt` and `output` tell its own tokens from those of other texts."""
        if not self._free:
            texts = self.memory.texts
            self._free = list(range(len(texts), 2 * len(texts)))
            self.memory.take_texts(np.concatenate([texts, np.zeros_like(texts)]))
        row = self._free.pop()
        self.memory.texts[row] = (group, prompt, output, 0, 0)
        return row

    def restart(self, row: int) -> None:
        """Go back to the start of a text."""
        self.memory.texts[row]["length"] = 0

    def end(self, row: int) -> None:
        """Forget where a text was. What it said stays."""
        self._free.append(row)

    def read(self, rows: list[int], counts: list[int], tokens: list[int], kinds: bytes | bytearray) -> None:
        """Read the next `counts` tokens of the texts `rows`, one text after another, with the `TokenKind` of each."""
        texts, numbers, ids = (np.array(some, np.int64) for some in (rows, counts, tokens))
        self._kernels.read(self.memory, texts, numbers, ids, np.frombuffer(kinds, np.uint8))

    def lookup(self, rows: IntArray, nodes: Nodes, frontier: IntArray) -> tuple[IntArray, FloatArray]:
        """Return what may follow the nodes `frontier` [n]: tokens and probabilities [n, WIDTH], the best first.

        `rows` [trees] are the texts of the trees. Probability 0 marks an empty entry.
        """
        return self._kernels.lookup(self.memory, rows, nodes, frontier, WIDTH)

    def source(self, rows: IntArray) -> CompiledSource | None:
        """Return where C finds what `lookup` returns for these texts; None if it is not compiled."""
        function, lookup = offer_function("offer_lookups"), self._kernels.lookup_function
        return LookupSource(function, lookup, self.layout, rows, WIDTH) if function and lookup else None
