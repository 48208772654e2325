"""Suffix drafter: what followed the last few tokens earlier will follow them again, in this text or others of its job.

Free of any forward. The longest match of the text's end proposes its continuations by how often they followed: in the
text itself, or in the finished texts of its group where they match more of it. How far a match of each length can be
trusted is learned from what the target really drew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Seq

import numpy as np

from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest

_LONGEST = 6  # tokens of a match at most
_WIDTH = 4  # continuations per node at most
# How often a match of 0, 1, 2, … tokens held on our example prompts; where each engine starts learning.
_PRIOR_TRUST = (0.0, 0.2, 0.6, 0.7, 0.7, 0.85, 0.9)
_PRIOR_TRIES = 8.0  # weight of the prior
_FORGET = 0.98  # older trials count less: texts of a job change
_GROUPS = 8  # jobs whose finished texts are remembered; the one longest unused is forgotten first
_GROUP_RUNS = 400_000  # runs of tokens remembered of one job: some 100 MB at most

Followers = dict[int, int]  # token -> how often


class SuffixDrafter:
    """Drafts from each sequence's own prompt and output, and from the finished outputs of its group."""

    name = "suffix"
    forward_free = None  # it has no other part

    def __init__(self) -> None:
        """Start with a prior: the longer the match, the likelier its continuation."""
        self._texts: dict[int, _Text] = {}
        self._groups: OrderedDict[Hashable, _Runs] = OrderedDict()
        self._own, self._others = _Trust(), _Trust()

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer the continuations of the longest match of each node's text."""
        tokens = np.zeros((len(frontier), _WIDTH), np.int64)
        probabilities = np.zeros((len(frontier), _WIDTH))
        for row, (node, tree) in enumerate(zip(frontier.tolist(), forest.tree[frontier].tolist(), strict=True)):
            sequence = forest.sequences[tree]
            trust, length, followers = self._match(sequence, self._text(sequence), forest.path(node))
            if not length:
                continue
            share = trust.of(length) / sum(followers.values())
            for rank, (token, count) in enumerate(_commonest(followers)):
                tokens[row, rank] = token
                probabilities[row, rank] = share * count
        return Candidates(tokens, probabilities)

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Reading the text costs no forward."""
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Score the matches along the emitted tokens, then add those to the sequence's text."""
        sequence = forest.sequences[tree]
        text = self._text(sequence, behind=len(emitted))
        for token in emitted:
            trust, length, followers = self._match(sequence, text)
            if length:
                trust.learn(length, held=token in followers)
            text.append(token)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence; what it wrote to its end, its group remembers."""
        self._texts.pop(id(sequence), None)
        if sequence.finish_reason is None or sequence.group is None:
            return
        group = self._groups.setdefault(sequence.group, _Runs())
        self._groups.move_to_end(sequence.group)
        group.add(sequence.ids, sequence.num_prompt)
        if len(self._groups) > _GROUPS:
            self._groups.popitem(last=False)

    def _match(self, sequence: Sequence, text: _Text, path: Seq[int] = ()) -> tuple[_Trust, int, Followers]:
        """Return the longest match of a text's end with a draft path behind it, and whose trust it has; 0 for none."""
        end = text.end(path)
        length, followers = text.runs.match(end, longer_than=0)
        group = self._groups.get(sequence.group) if sequence.group is not None else None
        if group is not None:
            longer, found = group.match(end, longer_than=length)
            if longer:
                return self._others, longer, found
        return self._own, length, followers

    def _text(self, sequence: Sequence, behind: int = 0) -> _Text:
        text = self._texts.get(id(sequence))
        if text is None:
            text = self._texts[id(sequence)] = _Text()
        if len(text.ids) < len(sequence.ids) - behind:
            for token in sequence.ids[len(text.ids) : len(sequence.ids) - behind]:
                text.append(token)
        return text


def _commonest(followers: Followers) -> Iterable[tuple[int, int]]:
    """Return the likeliest followers with their counts; of equals, the one seen first."""
    if len(followers) == 1:
        return followers.items()
    return sorted(followers.items(), key=lambda item: -item[1])[:_WIDTH]


class _Trust:
    """How often the continuation of a match held, by its length."""

    def __init__(self) -> None:
        self._hits = [_PRIOR_TRIES * trust for trust in _PRIOR_TRUST]
        self._tries = [_PRIOR_TRIES] * (_LONGEST + 1)

    def of(self, length: int) -> float:
        return self._hits[length] / self._tries[length]

    def learn(self, length: int, *, held: bool) -> None:
        self._tries[length] = self._tries[length] * _FORGET + 1.0
        self._hits[length] = self._hits[length] * _FORGET + held


class _Runs:
    """For every run of up to _LONGEST tokens: what followed it, and how often."""

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], Followers] = {}

    def note(self, end: Seq[int], token: int) -> None:
        """Note that `token` followed an end of text."""
        for start in range(len(end)):
            followers = self._followers.setdefault(tuple(end[start:]), {})
            followers[token] = followers.get(token, 0) + 1

    def add(self, ids: Seq[int], start: int) -> None:
        """Note every token from `start` on, while there is room."""
        for place in range(max(start, 1), len(ids)):
            if len(self._followers) >= _GROUP_RUNS:
                return
            self.note(ids[max(place - _LONGEST, 0) : place], ids[place])

    def match(self, end: Seq[int], *, longer_than: int) -> tuple[int, Followers]:
        """Return (length, followers) of the longest run at an end of text; length 0 for none that is longer.

        The end of a run is one, so a run that is not there ends the search.
        """
        found: tuple[int, Followers] = (0, {})
        for length in range(longer_than + 1, len(end) + 1):
            followers = self._followers.get(tuple(end[-length:]))
            if followers is None:
                break
            found = (length, followers)
        return found


class _Text:
    """One sequence's text so far, and its runs."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.runs = _Runs()

    def end(self, path: Seq[int] = ()) -> list[int]:
        """Return the last tokens of the text with a draft path behind it."""
        return [*self.ids[-_LONGEST:], *path][-_LONGEST:]

    def append(self, token: int) -> None:
        """Add the next token."""
        self.runs.note(self.ids[-_LONGEST:], token)
        self.ids.append(token)
