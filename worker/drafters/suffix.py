"""Suffix drafter: what followed the last few tokens earlier in this text will follow them again.

Free of any forward. The longest earlier match of the text's end proposes its continuations by how often they followed;
how far a match of each length can be trusted is learned from what the target really drew.
"""

from __future__ import annotations

import numpy as np

from worker.engine.draft_tree import Candidates, Forest
from worker.engine.rows import IntArray
from worker.engine.sequence import Sequence

_LONGEST = 6  # tokens of a match at most
_WIDTH = 4  # continuations per node at most
# How often a match of 0, 1, 2, … tokens held on our example prompts; where each engine starts learning.
_PRIOR_TRUST = (0.0, 0.2, 0.6, 0.7, 0.7, 0.85, 0.9)
_PRIOR_TRIES = 8.0  # weight of the prior
_FORGET = 0.98  # older trials count less: texts of a job change


class SuffixDrafter:
    """Drafts from each sequence's own prompt and output."""

    name = "suffix"

    def __init__(self) -> None:
        """Start with a prior: the longer the match, the likelier its continuation."""
        self._indexes: dict[int, _Index] = {}
        self._hits = _PRIOR_TRIES * np.array(_PRIOR_TRUST)
        self._tries = np.full(_LONGEST + 1, _PRIOR_TRIES)

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer the continuations of the longest match of each node's text."""
        tokens = np.zeros((len(frontier), _WIDTH), np.int64)
        probabilities = np.zeros((len(frontier), _WIDTH))
        for row, node in enumerate(frontier):
            index = self._index(forest.sequences[forest.tree[node]])
            length, followers = index.match(forest.path(int(node)))
            if not length:
                continue
            trust = self._hits[length] / self._tries[length]
            total = sum(followers.values())
            for rank, (token, count) in enumerate(_commonest(followers)):
                tokens[row, rank] = token
                probabilities[row, rank] = trust * count / total
        return Candidates(tokens, probabilities)

    def behind(self, sequence: Sequence) -> int:
        """Reading the text costs no forward."""
        return 0

    def keep(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Score the matches along the emitted tokens, then add those to the sequence's index."""
        index = self._index(forest.sequences[tree], behind=len(emitted))
        for token in emitted:
            length, followers = index.match([])
            if length:
                self._tries[length] = self._tries[length] * _FORGET + 1.0
                self._hits[length] = self._hits[length] * _FORGET + float(token in followers)
            index.append(token)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._indexes.pop(id(sequence), None)

    def _index(self, sequence: Sequence, behind: int = 0) -> _Index:
        index = self._indexes.get(id(sequence))
        if index is None:
            index = self._indexes[id(sequence)] = _Index()
        for token in sequence.ids[len(index.ids) : len(sequence.ids) - behind]:
            index.append(token)
        return index


def _commonest(followers: dict[int, int]) -> list[tuple[int, int]]:
    """Return the likeliest followers with their counts; of equals, the one seen first."""
    if len(followers) == 1:
        return list(followers.items())
    return sorted(followers.items(), key=lambda item: -item[1])[:_WIDTH]


class _Index:
    """For every run of up to _LONGEST tokens of one text: what followed it, and how often."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}

    def append(self, token: int) -> None:
        """Add the next token of the text."""
        tail = self.ids[-_LONGEST:]
        for start in range(len(tail)):
            followers = self._followers.setdefault(tuple(tail[start:]), {})
            followers[token] = followers.get(token, 0) + 1
        self.ids.append(token)

    def match(self, path: list[int]) -> tuple[int, dict[int, int]]:
        """Return (length, followers) of the longest end of text + path that occurred before; length 0 for none."""
        tail = [*self.ids[-_LONGEST:], *path][-_LONGEST:]
        for start in range(len(tail)):
            followers = self._followers.get(tuple(tail[start:]))
            if followers:
                return len(tail) - start, followers
        return 0, {}
