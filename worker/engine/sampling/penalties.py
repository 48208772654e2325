"""Token counts of a sequence, and the penalties and biases that they bring to the logits of its next token."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.engine.sampling.parameters import Adjustments, Bias
from worker.engine.segments import IntArray

NONE_SEEN: tuple[IntArray, IntArray] = (np.empty(0, np.int64), np.empty(0, np.int64))


class TokenCounts:
    """The distinct tokens of one sequence, and how often each occurs in its output. Updated incrementally."""

    def __init__(self) -> None:
        self._num_counted = 0
        self._index: dict[int, int] = {}
        self._tokens = array("q")
        self._counts = array("q")

    def update(self, ids: list[int], num_prompt: int) -> None:
        """Count the tokens of `ids` beyond those that were counted before."""
        for i in range(self._num_counted, len(ids)):
            self._add(ids[i], int(i >= num_prompt))
        self._num_counted = len(ids)

    def with_path(self, path: Seq[int]) -> tuple[IntArray, IntArray]:
        """Return the distinct tokens of the sequence followed by `path`, and how often each occurs in the output."""
        new = list(dict.fromkeys(token for token in path if token not in self._index))
        tokens = np.concatenate([np.array(new, np.int64), np.array(self._tokens, np.int64)])
        counts = np.concatenate([np.zeros(len(new), np.int64), np.array(self._counts, np.int64)])
        for token in path:
            index = self._index.get(token)
            counts[new.index(token) if index is None else len(new) + index] += 1
        return tokens, counts

    def _add(self, token: int, count: int) -> None:
        index = self._index.setdefault(token, len(self._tokens))
        if index == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        self._counts[index] += count


def adjustments_of(biases: Seq[Bias], seen: Seq[tuple[IntArray, IntArray]]) -> Adjustments:
    """Return the adjustments of rows; `seen` holds the `TokenCounts.with_path` of each, or `NONE_SEEN`."""
    bias_starts, bias_tokens, values = _rows_of(biases)
    seen_starts, seen_tokens, seen_counts = _rows_of(seen)
    return Adjustments(
        bias_starts, bias_tokens, values.astype(np.float32), seen_starts, seen_tokens, seen_counts.astype(np.int64)
    )


def _rows_of(lists: Seq[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[IntArray, IntArray, NDArray[Any]]:
    """Return the concatenated lists, and where each starts: [rows + 1]."""
    starts = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(tokens) for tokens, _ in lists], out=starts[1:])
    return starts, np.concatenate([tokens for tokens, _ in lists]), np.concatenate([values for _, values in lists])
