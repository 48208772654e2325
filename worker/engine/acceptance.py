"""Acceptance: how often the target really draws what a drafter gives a probability, learned while decoding.

drafter -> [acceptance] -> draft_tree. The target's own token is known at every node that it accepted, so each of these
nodes labels all candidates that were offered below it, whether they were verified or not: nothing is censored by the
budget. A candidate's value is its probability times the ratio of hits to promises among candidates of like depth and
like probability; greedy and sampled sequences are counted apart, and so are the sources of a mixed drafter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from worker.engine.draft_tree import SOURCES, Candidates, Forest
from worker.engine.rows import IntArray

_EDGES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])  # classes of probability, between these
_DEPTHS = 4  # 1, 2, 3, and deeper
_PRIOR = 4.0  # promises that are taken as kept before anything is known
_FORGET = 0.998  # per step: texts of a job change
_HIGHEST = 0.995  # nothing is certain


class Acceptance:
    """Hits and promises of one drafter, by sampling, depth and probability."""

    def __init__(self) -> None:
        """Start by believing the drafter."""
        shape = (2, SOURCES, _DEPTHS, len(_EDGES) + 1)
        self._hits = np.full(shape, _PRIOR)
        self._promised = np.full(shape, _PRIOR)

    def of(self, forest: Forest, frontier: IntArray, offered: Candidates) -> Candidates:
        """Return the candidates with P(the target draws this token here | it reached the node)."""
        where = self._classes(forest, frontier, offered)
        ratio = self._hits[where] / self._promised[where]
        return replace(offered, probabilities=np.minimum(offered.probabilities * ratio, _HIGHEST))

    def learn(self, forest: Forest, frontier: IntArray, offered: Candidates, drawn: IntArray) -> None:
        """Label the candidates of every node whose drawn token is known: `drawn` [frontier], -1 where it is not."""
        known = drawn >= 0
        if not known.any():
            return
        source = None if offered.source is None else offered.source[known]
        offered = Candidates(offered.tokens[known], offered.probabilities[known], source)
        where = self._classes(forest, frontier[known], offered)
        hit = (offered.tokens == drawn[known, None]) & (offered.probabilities > 0.0)
        places = np.ravel_multi_index(where, self._hits.shape).ravel()
        for table, counted in ((self._hits, hit), (self._promised, offered.probabilities)):
            table += np.bincount(places, counted.ravel(), minlength=table.size).reshape(table.shape)

    def forget(self) -> None:
        """Let what was learned weigh a little less; call once a step."""
        self._hits = _PRIOR + (self._hits - _PRIOR) * _FORGET
        self._promised = _PRIOR + (self._promised - _PRIOR) * _FORGET

    def as_json(self) -> dict[str, Any]:
        """Return hits over promises by source and depth, all probabilities together."""
        ratio = self._hits.sum(axis=-1) / self._promised.sum(axis=-1)
        return {
            name: [[round(float(r), 3) for r in by_depth] for by_depth in rows]
            for name, rows in zip(("greedy", "sampled"), ratio, strict=True)
        }

    @staticmethod
    def _classes(forest: Forest, frontier: IntArray, offered: Candidates) -> tuple[IntArray, ...]:
        """Return the indices of each candidate's class, each [frontier, k]."""
        sampled = forest.sampled[forest.tree[frontier]].astype(np.int64)
        depth = np.minimum(forest.depth[frontier], _DEPTHS - 1)
        shape = offered.probabilities.shape
        source = np.zeros(shape, np.int64) if offered.source is None else offered.source
        return (
            np.broadcast_to(sampled[:, None], shape),
            source,
            np.broadcast_to(depth[:, None], shape),
            np.searchsorted(_EDGES, offered.probabilities),
        )


def drawn_tokens(frontier: IntArray, drawn_at: dict[int, int]) -> IntArray:
    """Return the target's token at each frontier node, -1 where the target did not come by."""
    return np.array([drawn_at.get(int(node), -1) for node in frontier], np.int64)
