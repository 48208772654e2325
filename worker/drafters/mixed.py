"""Mixed drafter: what the text has said before and what a network foresees, in one tree.

A token that both offer is offered once; how far such an agreement can be trusted is learned like everything else.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter

NETWORK, SUFFIX, BOTH = 0, 1, 2  # who offers a candidate


class MixedDrafter:
    """Two sources of candidates below every node."""

    def __init__(self, network: Drafter, suffix: Drafter) -> None:
        """Take a drafter that runs a network and one that looks things up."""
        self.name = f"{network.name}+{suffix.name}"
        self._network = network
        self._suffix = suffix

    @property
    def forward_free(self) -> Drafter:
        """The part that looks things up."""
        return _Labelled(self._suffix)

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer what either offers."""
        return _merged(self._network.expand(forest, frontier), self._suffix.expand(forest, frontier))

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return how far the network is behind."""
        return self._network.num_uncached_tokens(sequence)

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Let both learn what was kept."""
        self._network.commit(forest, tree, path, emitted)
        self._suffix.commit(forest, tree, path, emitted)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._network.drop(sequence)
        self._suffix.drop(sequence)


class _Labelled:
    """A part of a mixed drafter by itself: its candidates keep their source. What was kept, the whole is told."""

    forward_free = None

    def __init__(self, part: Drafter) -> None:
        self.name = part.name
        self.num_uncached_tokens, self.commit, self.drop = part.num_uncached_tokens, part.commit, part.drop
        self._part = part

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        offered = self._part.expand(forest, frontier)
        return replace(offered, source=np.full_like(offered.tokens, SUFFIX))


def _merged(a: Candidates, b: Candidates) -> Candidates:
    """Return the candidates of both; a token that both offer stands where the first has it."""
    if not b.probabilities.any():
        return a
    same = (a.tokens[:, :, None] == b.tokens[:, None, :]) & (a.probabilities > 0)[:, :, None]
    same &= (b.probabilities > 0)[:, None, :]
    # Unless both are wrong. They are not independent, and what that changes is learned.
    others = np.where(same, b.probabilities[:, None, :], 0.0).max(axis=2)
    both = 1.0 - (1.0 - a.probabilities) * (1.0 - others)
    return Candidates(
        tokens=np.concatenate([a.tokens, b.tokens], axis=1),
        probabilities=np.concatenate([both, np.where(same.any(axis=1), 0.0, b.probabilities)], axis=1),
        source=np.concatenate([np.where(same.any(axis=2), BOTH, NETWORK), np.full_like(b.tokens, SUFFIX)], axis=1),
    )
