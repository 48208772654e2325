"""Suffix drafter: propose what followed the last few tokens earlier, in this sequence or in others of its group.

It runs no forward (cf. SuffixDecoding, arXiv 2411.04975). The longest match of the sequence's suffix proposes its
continuations by frequency: within the sequence, or within the finished sequences of its group if these match more
tokens. The reliability of a match of each length is learned from the tokens that the target drew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Seq

import numpy as np

from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter

_MAX_MATCH = 6  # tokens; a longer match is hardly more reliable, and each length takes memory
_WIDTH = 4  # max continuations per node
# Initial reliability of matches of 0, 1, 2, … tokens, as measured on the example prompts.
_PRIOR_RELIABILITY = (0.0, 0.2, 0.6, 0.7, 0.7, 0.85, 0.9)
_PRIOR_TRIALS = 8.0  # that the prior counts for; more learn more slowly
_DECAY = 0.98  # per trial: half is forgotten in 34; lower follows new text sooner, and is noisier
_MAX_GROUPS = 8  # groups (jobs) whose finished sequences are indexed; the least recently used is dropped
_MAX_GROUP_NGRAMS = 400_000  # n-grams of one group: about 100 MB

Followers = dict[int, int]  # token -> count


class SuffixDrafter:
    """Drafts from each sequence's own prompt and output, and from the finished outputs of its group."""

    name = "suffix"

    def __init__(self) -> None:
        self._sequences: dict[int, _SequenceIndex] = {}
        self._groups: OrderedDict[Hashable, _NgramIndex] = OrderedDict()
        self._own, self._in_group = _Reliability(), _Reliability()

    @property
    def forward_free(self) -> Drafter:
        """All of it: it runs no forward."""
        return self

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer the continuations of the longest match at each node."""
        tokens = np.zeros((len(frontier), _WIDTH), np.int64)
        probabilities = np.zeros((len(frontier), _WIDTH))
        for row, (node, tree) in enumerate(zip(frontier.tolist(), forest.tree[frontier].tolist(), strict=True)):
            sequence = forest.sequences[tree]
            reliability, length, followers = self._match(sequence, self._index(sequence), forest.path(node))
            if not length:
                continue
            share = reliability.of(length) / sum(followers.values())
            for rank, (token, count) in enumerate(_commonest(followers)):
                tokens[row, rank] = token
                probabilities[row, rank] = share * count
        return Candidates(tokens, probabilities)

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return 0: reading takes no forward."""
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Learn whether the matches along the emitted tokens held, then index these tokens.

        A token that a grammar forced says nothing about a match.
        """
        sequence = forest.sequences[tree]
        index = self._index(sequence, without=len(emitted))
        forced = forest.forced[path].tolist() + [False] * len(emitted)  # the target's own token is none
        for token, was_forced in zip(emitted, forced, strict=False):
            reliability, length, followers = self._match(sequence, index)
            if length and not was_forced:
                reliability.learn(length, held=token in followers)
            index.append(token)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence. If it finished, add its output to the index of its group."""
        self._sequences.pop(id(sequence), None)
        if sequence.finish_reason is None or sequence.group is None:
            return
        group = self._groups.setdefault(sequence.group, _NgramIndex())
        self._groups.move_to_end(sequence.group)
        group.add(sequence.ids, sequence.num_prompt)
        if len(self._groups) > _MAX_GROUPS:
            self._groups.popitem(last=False)

    def _match(
        self, sequence: Sequence, index: _SequenceIndex, path: Seq[int] = ()
    ) -> tuple[_Reliability, int, Followers]:
        """Return the longest match at the end of a sequence followed by a path: (reliability, length, followers).

        The length is 0 if nothing matches.
        """
        suffix = index.suffix(path)
        length, followers = index.ngrams.match(suffix, longer_than=0)
        group = self._groups.get(sequence.group) if sequence.group is not None else None
        if group is not None:
            longer, found = group.match(suffix, longer_than=length)
            if longer:
                return self._in_group, longer, found
        return self._own, length, followers

    def _index(self, sequence: Sequence, without: int = 0) -> _SequenceIndex:
        """Return the index of a sequence, up to date but for its last `without` tokens."""
        index = self._sequences.get(id(sequence))
        if index is None:
            index = self._sequences[id(sequence)] = _SequenceIndex()
        for token in sequence.ids[len(index.ids) : len(sequence.ids) - without]:
            index.append(token)
        return index


def _commonest(followers: Followers) -> Iterable[tuple[int, int]]:
    """Return the most frequent followers with their counts; of equals, the one seen first."""
    if len(followers) == 1:
        return followers.items()
    return sorted(followers.items(), key=lambda item: -item[1])[:_WIDTH]


class _Reliability:
    """How often the target drew a token that a match proposed, by length of the match."""

    def __init__(self) -> None:
        self._hits = [_PRIOR_TRIALS * reliability for reliability in _PRIOR_RELIABILITY]
        self._trials = [_PRIOR_TRIALS] * (_MAX_MATCH + 1)

    def of(self, length: int) -> float:
        return self._hits[length] / self._trials[length]

    def learn(self, length: int, *, held: bool) -> None:
        self._trials[length] = self._trials[length] * _DECAY + 1.0
        self._hits[length] = self._hits[length] * _DECAY + held


class _NgramIndex:
    """For every n-gram of up to `_MAX_MATCH` tokens: which tokens followed it, and how often."""

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], Followers] = {}

    def count(self, suffix: Seq[int], token: int) -> None:
        """Count `token` as a follower of every n-gram at the end of `suffix`."""
        for start in range(len(suffix)):
            followers = self._followers.setdefault(tuple(suffix[start:]), {})
            followers[token] = followers.get(token, 0) + 1

    def add(self, ids: Seq[int], start: int) -> None:
        """Count every token from `start` on, up to `_MAX_GROUP_NGRAMS`."""
        for position in range(max(start, 1), len(ids)):
            if len(self._followers) >= _MAX_GROUP_NGRAMS:
                return
            self.count(ids[max(position - _MAX_MATCH, 0) : position], ids[position])

    def match(self, suffix: Seq[int], *, longer_than: int) -> tuple[int, Followers]:
        """Return (length, followers) of the longest known n-gram at the end of `suffix`; length 0 if none is longer.

        Every suffix of a known n-gram is known, so the first unknown one ends the search.
        """
        found: tuple[int, Followers] = (0, {})
        for length in range(longer_than + 1, len(suffix) + 1):
            followers = self._followers.get(tuple(suffix[-length:]))
            if followers is None:
                break
            found = (length, followers)
        return found


class _SequenceIndex:
    """One sequence's tokens so far, and their n-grams."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ngrams = _NgramIndex()

    def suffix(self, path: Seq[int] = ()) -> list[int]:
        """Return the last tokens of the sequence followed by a draft path."""
        return [*self.ids[-_MAX_MATCH:], *path][-_MAX_MATCH:]

    def append(self, token: int) -> None:
        """Add the next token."""
        self.ngrams.count(self.ids[-_MAX_MATCH:], token)
        self.ids.append(token)
