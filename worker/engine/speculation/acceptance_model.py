"""How often the target really draws what a drafter gives a probability, learned while decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from worker.engine.segments import IntArray
from worker.engine.speculation.draft_tree import SOURCES, Candidates, Forest

_EDGES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])  # classes of probability, between these
_DEPTHS = 4  # 1, 2, 3, and deeper
_PRIOR = 4.0  # promises that are taken as kept before anything is known
_FORGET = 0.998  # per step: texts of a job change
_HIGHEST = 0.995  # nothing is certain


_BINS = len(_EDGES) + 1
_SHAPE = (2, SOURCES, _DEPTHS, _BINS)  # sampled or not, source, depth, class of probability
_SIZE = 2 * SOURCES * _DEPTHS * _BINS
_WEIGHT = 30.0  # accepted tokens that a tree's promises are believed to have kept before anything is known


class AcceptanceModel:
    """Hits and promises of one drafter, by sampling, source, depth and probability."""

    def __init__(self) -> None:
        """Start by believing the drafter."""
        self._hits, self._promised = np.full(_SIZE, _PRIOR), np.full(_SIZE, _PRIOR)
        self._kept, self._chosen = _WEIGHT, _WEIGHT

    @property
    def worth(self) -> float:
        """What the trees that were shown have been worth of their promise.

        They hold the best of many estimates, and the best of many is over-estimated, however right each is on average.
        """
        return self._kept / self._chosen

    def of(self, forest: Forest, frontier: IntArray, offered: Candidates) -> Candidates:
        """Return the candidates with P(the target draws this token here | it reached the node)."""
        where = _classes(forest, frontier, offered)
        ratio = (self._hits / self._promised)[where]
        return replace(offered, probabilities=np.minimum(offered.probabilities * ratio, _HIGHEST))

    def learn(self, forest: Forest, frontier: IntArray, offered: Candidates, drawn: IntArray) -> None:
        """Label the candidates of every node whose drawn token is known: `drawn` [frontier], -1 where it is not."""
        known = np.flatnonzero(drawn >= 0)
        if not len(known):
            return
        probabilities = offered.probabilities[known]
        where = _classes(forest, frontier, offered)[known].ravel()
        hit = (offered.tokens[known] == drawn[known, None]) & (probabilities > 0.0)
        self._hits += np.bincount(where, hit.ravel(), minlength=_SIZE)
        self._promised += np.bincount(where, probabilities.ravel(), minlength=_SIZE)

    def learn_worth(self, expected: float, accepted: int) -> None:
        """Learn from the trees of a step: so many accepted tokens were expected, `worth` included, and came."""
        self._chosen += expected / self.worth
        self._kept += accepted

    def forget(self) -> None:
        """Let what was learned weigh a little less; call once a step."""
        for table in (self._hits, self._promised):
            table *= _FORGET
            table += _PRIOR * (1.0 - _FORGET)
        self._kept = _WEIGHT + (self._kept - _WEIGHT) * _FORGET
        self._chosen = _WEIGHT + (self._chosen - _WEIGHT) * _FORGET

    def as_json(self) -> dict[str, Any]:
        """Return hits over promises by source and depth, all probabilities together, and what trees were worth."""
        hits, promised = (table.reshape(_SHAPE).sum(axis=-1) for table in (self._hits, self._promised))
        ratio = (hits / promised).round(3).tolist()
        return {"greedy": ratio[0], "sampled": ratio[1], "worth": round(self.worth, 3)}


def _classes(forest: Forest, frontier: IntArray, offered: Candidates) -> IntArray:
    """Return the class of each candidate, [frontier, k]."""
    sampled = forest.sampled[forest.tree[frontier]]
    depth = np.minimum(forest.depth[frontier], _DEPTHS - 1)
    classes = np.searchsorted(_EDGES, offered.probabilities)
    classes += ((sampled * SOURCES * _DEPTHS + depth) * _BINS)[:, None]
    if offered.source is not None:
        classes += offered.source * (_DEPTHS * _BINS)
    return classes


def drawn_tokens(frontier: IntArray, drawn_at: dict[int, int]) -> IntArray:
    """Return the target's token at each frontier node, -1 where the target did not come by."""
    return np.array([drawn_at.get(int(node), -1) for node in frontier], np.int64)
