"""Learn, while decoding, how often the target draws a token to which the drafter gives a probability.

Calibration by binning: within a bin, accepted over expected tokens corrects the drafter's probability. Every node that
the target reached labels all candidates offered there, verified or not, so the labels are not censored by the cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from worker.engine.host.bins import Bins
from worker.engine.host.growth import CompiledGrowth, Correction, Decay
from worker.engine.host.tree_kernels import tree_kernels
from worker.engine.segments import IntArray
from worker.engine.speculation.constants import (
    ACCEPTANCE_DECAY,
    ACCEPTANCE_PRIOR,
    DEPTH_CLASSES,
    DISCOUNT_PRIOR,
    MAX_PROBABILITY,
    PROBABILITY_EDGES,
)
from worker.engine.speculation.draft_tree import SOURCES, Candidates, Forest

_DECAY = Decay(ACCEPTANCE_DECAY, ACCEPTANCE_PRIOR)


class AcceptanceModel:
    """Accepted and expected tokens of one drafter, by sampling, source, depth and probability."""

    def __init__(self) -> None:
        """Start with the drafter's own probabilities."""
        self._bins = Bins(PROBABILITY_EDGES, SOURCES, DEPTH_CLASSES, ACCEPTANCE_PRIOR)
        self._tree_accepted, self._tree_expected = DISCOUNT_PRIOR, DISCOUNT_PRIOR

    @property
    def tree_discount(self) -> float:
        """Accepted over expected tokens of the trees that were verified.

        A tree holds the candidates with the highest estimates, and the highest of many estimates is too high on average
        even if each alone is unbiased (the optimizer's curse, Smith and Winkler 2006).
        """
        return self._tree_accepted / self._tree_expected

    def correction(self, forest: Forest) -> Correction:
        """Return what `of` does with the candidates of a forest, for compiled growth."""
        return Correction(self._bins, forest.sampled, MAX_PROBABILITY)

    def of(self, forest: Forest, frontier: IntArray, offered: Candidates) -> Candidates:
        """Return the candidates with P(the target draws this token here | it reached the node)."""
        given = (forest, frontier, offered, forest.sampled, self._bins, MAX_PROBABILITY)
        return Candidates(offered.tokens, tree_kernels().corrected(*given), offered.source)

    def learn_growth(self, growth: CompiledGrowth, forest: Forest, drawn: tuple[IntArray, IntArray, IntArray]) -> None:
        """Learn from all that was offered to trees that grew in C, then `forget`: see `CompiledGrowth.learn`."""
        growth.learn(forest, self._bins, forest.sampled, drawn, _DECAY)
        self._forget_discount()

    def learn(self, forest: Forest, frontier: IntArray, offered: Candidates, drawn: IntArray) -> None:
        """Label the candidates of every node whose drawn token is known: `drawn` [frontier], -1 where it is not."""
        tree_kernels().count_accepted(forest, frontier, offered, forest.sampled, self._bins, drawn)

    def learn_discount(self, expected: float, accepted: int) -> None:
        """Learn from the trees of a step: `expected` tokens, with `tree_discount` applied, and `accepted` ones."""
        self._tree_expected += expected / self.tree_discount
        self._tree_accepted += accepted

    def forget(self) -> None:
        """Decay all counts towards the prior; call once per step."""
        tree_kernels().decay(self._bins, _DECAY.weight, _DECAY.prior)
        self._forget_discount()

    def _forget_discount(self) -> None:
        self._tree_accepted = DISCOUNT_PRIOR + (self._tree_accepted - DISCOUNT_PRIOR) * ACCEPTANCE_DECAY
        self._tree_expected = DISCOUNT_PRIOR + (self._tree_expected - DISCOUNT_PRIOR) * ACCEPTANCE_DECAY

    def record(self) -> dict[str, Any]:
        """Return all counts as JSON, for `restore`."""
        trees = [round(self._tree_accepted, 3), round(self._tree_expected, 3)]
        return {
            "accepted": self._bins.accepted.round(3).tolist(),
            "expected": self._bins.expected.round(3).tolist(),
            "trees": trees,
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Continue from what `record` returned; raises ValueError if it does not fit."""
        accepted, expected = (np.array(record[name], np.float64) for name in ("accepted", "expected"))
        trees = [float(count) for count in record["trees"]]
        counts = np.concatenate([accepted, expected, trees])
        size = self._bins.count
        if len(accepted) != size or len(expected) != size or not (np.isfinite(counts) & (counts > 0)).all():
            raise ValueError("the stored counts of acceptance don't fit")
        self._bins.accepted[:], self._bins.expected[:] = accepted, expected
        self._tree_accepted, self._tree_expected = trees

    def as_json(self) -> dict[str, Any]:
        """Return accepted over expected by source and depth, all probabilities together, and the tree discount."""
        bins = self._bins
        accepted, expected = (table.reshape(bins.shape).sum(axis=-1) for table in (bins.accepted, bins.expected))
        ratio = (accepted / expected).round(3).tolist()
        return {"greedy": ratio[0], "sampled": ratio[1], "worth": round(self.tree_discount, 3)}
