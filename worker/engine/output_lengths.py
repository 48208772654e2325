"""How many tokens an answer is expected to have, learned from the answers of its group (job).

The length is a high quantile of the Kaplan-Meier estimate (1958): an answer that is still being decoded counts as one
of at least its present length. Without that, the first answers to end, which are short, would pass for all.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

import numpy as np

from worker.engine.segments import IntArray

QUANTILE = 0.85
PRIOR_TOKENS = 512  # expected until enough answers have ended
_ENOUGH = 8  # ended answers of a group that make the prior superfluous
_REMEMBERED = 256  # ended answers of a group that count: the latest
_MAX_GROUPS = 64  # the least recently used is dropped


class OutputLengths:
    """Lengths of ended answers by group, in tokens."""

    def __init__(self) -> None:
        """Start without an answer."""
        self._ended: OrderedDict[Hashable, deque[int]] = OrderedDict()

    def learn(self, group: Hashable, tokens: int) -> None:
        """Take the length of an answer that has ended."""
        self._ended.setdefault(group, deque(maxlen=_REMEMBERED)).append(tokens)
        self._ended.move_to_end(group)
        if len(self._ended) > _MAX_GROUPS:
            self._ended.popitem(last=False)

    def expected(self, group: Hashable, decoded: Sequence[int]) -> IntArray:
        """Return the expected final lengths of a group's unfinished answers, of which `decoded` tokens are there."""
        ended = self._ended.get(group, ())
        lengths = np.array([*ended, *decoded], np.int64)
        order = np.lexsort((np.arange(len(lengths)) >= len(ended), lengths))  # of equals, those that ended come first
        lengths = lengths[order]
        survival = np.cumprod(1.0 - (order < len(ended)) / np.arange(len(order), 0, -1))
        now = np.array(decoded, np.int64)
        reached = np.concatenate([[1.0], survival])[np.searchsorted(lengths, now, side="right")]
        at = np.searchsorted(-survival, -(1.0 - QUANTILE) * reached - 1e-12)
        known = (at < len(lengths)) & (reached > 0.0)
        # Where too many answers are longer than all that have ended, expect each to double.
        beyond = np.maximum(max(PRIOR_TOKENS, 2 * lengths.max(initial=0)), 2 * now + 16)
        quantile = lengths[np.minimum(at, len(lengths) - 1)]
        if len(ended) < _ENOUGH:
            quantile = np.maximum(quantile, PRIOR_TOKENS)
        expected: IntArray = np.maximum(np.where(known, quantile, beyond), now + 1)
        return expected
