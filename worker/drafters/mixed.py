"""Mixed drafter: candidates of a suffix drafter and of a draft network in one tree.

A token that both offer becomes one candidate with a source of its own (`BOTH`), so the acceptance model learns how much
more such an agreement is worth.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter

NETWORK, SUFFIX, BOTH = 0, 1, 2  # sources of candidates


class MixedDrafter:
    """Two sources of candidates below every node."""

    def __init__(self, network: Drafter, suffix: Drafter) -> None:
        """Combine a drafter that runs a network with one that looks tokens up."""
        self.name = f"{network.name}+{suffix.name}"
        self._network = network
        self._suffix = suffix

    @property
    def forward_free(self) -> Drafter:
        """The suffix drafter alone."""
        return _SuffixPart(self._suffix)

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer the candidates of both."""
        return _merged(self._network.expand(forest, frontier), self._suffix.expand(forest, frontier))

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return the committed tokens that the network must read."""
        return self._network.num_uncached_tokens(sequence)

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Pass the accepted tokens to both drafters."""
        self._network.commit(forest, tree, path, emitted)
        self._suffix.commit(forest, tree, path, emitted)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._network.drop(sequence)
        self._suffix.drop(sequence)


class _SuffixPart:
    """The suffix drafter used alone: its candidates keep their source. The engine commits to the mixed drafter."""

    def __init__(self, part: Drafter) -> None:
        self.name = part.name
        self.num_uncached_tokens, self.commit, self.drop = part.num_uncached_tokens, part.commit, part.drop
        self._part = part

    @property
    def forward_free(self) -> Drafter:
        return self

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        offered = self._part.expand(forest, frontier)
        return replace(offered, source=np.full_like(offered.tokens, SUFFIX))


def _merged(a: Candidates, b: Candidates) -> Candidates:
    """Return the candidates of both; a token that both offer keeps its position in `a`."""
    if not b.probabilities.any():
        return a
    same = (a.tokens[:, :, None] == b.tokens[:, None, :]) & (a.probabilities > 0)[:, :, None]
    same &= (b.probabilities > 0)[:, None, :]
    # Noisy-or: right unless both are wrong. They are not independent; the acceptance model learns the difference.
    others = np.where(same, b.probabilities[:, None, :], 0.0).max(axis=2)
    both = 1.0 - (1.0 - a.probabilities) * (1.0 - others)
    return Candidates(
        tokens=np.concatenate([a.tokens, b.tokens], axis=1),
        probabilities=np.concatenate([both, np.where(same.any(axis=1), 0.0, b.probabilities)], axis=1),
        source=np.concatenate([np.where(same.any(axis=2), BOTH, NETWORK), np.full_like(b.tokens, SUFFIX)], axis=1),
    )
