"""Which nodes of a forest the target will reach, where its texts are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worker.engine.segments import BoolArray, IntArray
from worker.engine.speculation.draft_tree import Forest

UNKNOWN = -1  # no token: beyond the end of a text


class TargetPath:
    """Follows the known texts down the trees of a step, layer by layer."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        """`texts` are the outputs of the sequences with the keys 0, 1, …"""
        self._texts = np.full((len(texts), max(map(len, texts), default=0) + 1), UNKNOWN)
        for row, text in enumerate(texts):
            self._texts[row, : len(text)] = text
        self.rows = self.written = self._last = np.empty(0, np.int64)

    def follow(self, forest: Forest, frontier: IntArray) -> tuple[BoolArray, IntArray]:
        """Return which frontier nodes are on the path [n], and the target's next token at each [n], or UNKNOWN.

        Call it once for each layer of a step, the roots first.
        """
        trees, depth = forest.tree[frontier], int(forest.depth[frontier[0]])
        if not depth:
            self.rows = np.array([s.key for s in forest.sequences], np.int64)
            self.written = forest.lengths - np.array([s.num_prompt for s in forest.sequences], np.int64)
            on = np.ones(len(frontier), np.bool_)
        else:
            on = (self._last[trees] == forest.parent[frontier]) & (
                self._token(trees, depth - 1) == forest.token[frontier]
            )
        self._last = np.full(len(forest.sequences), -1)
        self._last[trees[on]] = frontier[on]
        return on, np.where(on, self._token(trees, depth), UNKNOWN)

    def places(self, trees: IntArray, depth: int) -> tuple[IntArray, IntArray]:
        """Return text and position [n] of the tokens below nodes of trees at a depth."""
        return self.rows[trees], np.minimum(self.written[trees] + depth, self._texts.shape[1] - 1)

    def _token(self, trees: IntArray, depth: int) -> IntArray:
        tokens: IntArray = self._texts[self.places(trees, depth)]
        return tokens
