"""Laws of a mixed tree: every candidate once, and nothing that either source offers is lost."""

from __future__ import annotations

import numpy as np

from tests.unit.worker.engine.harness import sequences
from worker.drafters.mixed import BOTH, NETWORK, SUFFIX, MixedDrafter
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest


class Fixed:
    """A drafter with the same candidates below every node."""

    forward_free = None

    def __init__(self, name: str, tokens: list[int], probabilities: list[float]) -> None:
        self.name = name
        self._offer = (np.array([tokens]), np.array([probabilities]))

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        tokens, probabilities = (np.repeat(part, len(frontier), axis=0) for part in self._offer)
        return Candidates(tokens, probabilities)

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None: ...

    def drop(self, sequence: Sequence) -> None: ...


def test_a_token_that_both_offer_is_one_candidate_with_a_higher_probability() -> None:
    forest = Forest(sequences([[2, 3], [4]]))
    mixed = MixedDrafter(Fixed("head", [7, 8, 9], [0.5, 0.2, 0.1]), Fixed("suffix", [8, 30, 0], [0.6, 0.3, 0.0]))
    offered = mixed.expand(forest, forest.roots)
    assert mixed.name == "head+suffix"
    assert offered.source is not None
    for row in range(2):
        real = offered.probabilities[row] > 0
        tokens = offered.tokens[row][real].tolist()
        assert sorted(tokens) == [7, 8, 9, 30]
        offers = zip(offered.probabilities[row][real], offered.source[row][real], strict=True)
        said = dict(zip(tokens, offers, strict=True))
        assert said[7] == (0.5, NETWORK)
        assert said[30] == (0.3, SUFFIX)
        assert np.isclose(said[8][0], 1 - 0.8 * 0.4)
        assert said[8][1] == BOTH


def test_an_empty_candidate_matches_no_other() -> None:
    forest = Forest(sequences([[2, 3]]))
    mixed = MixedDrafter(Fixed("head", [0, 8], [0.4, 0.2]), Fixed("suffix", [0, 0], [0.0, 0.0]))
    offered = mixed.expand(forest, forest.roots)
    assert np.isclose(offered.probabilities.sum(), 0.6)
