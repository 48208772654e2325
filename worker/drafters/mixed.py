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
from worker.engine.speculation.drafting import BOTH, FIRST, SECOND, Drafter, merged

NETWORK, SUFFIX = FIRST, SECOND  # sources of candidates, as is BOTH

__all__ = ["BOTH", "NETWORK", "SUFFIX", "MixedDrafter"]


class MixedDrafter:
    """Two sources of candidates below every node."""

    def __init__(self, network: Drafter, suffix: Drafter) -> None:
        """Combine a drafter that runs a network with one that looks tokens up."""
        self.name = f"{network.name}+{suffix.name}"
        self.parts, self.label = (network, suffix), NETWORK
        self._network = network
        self._suffix = suffix

    @property
    def network(self) -> Drafter:
        """The drafter that runs a network, alone."""
        return self._network

    @property
    def forward_free(self) -> Drafter:
        """The suffix drafter alone."""
        return _SuffixPart(self._suffix)

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer the candidates of both."""
        return merged(self._network.expand(forest, frontier), self._suffix.expand(forest, frontier))

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
        self.parts, self.label = (part,), SUFFIX
        self._part = part

    @property
    def forward_free(self) -> Drafter:
        return self

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        offered = self._part.expand(forest, frontier)
        return replace(offered, source=np.full_like(offered.tokens, SUFFIX))
