"""Suffix drafter: propose what followed the same tokens earlier, in this sequence or in others of its group.

It runs no forward (cf. SuffixDecoding, arXiv 2411.04975). An index holds the prompts and outputs of all sequences of a
group, of those that run as well. The longest known context of a node proposes its followers, shorter ones propose
others. How likely a follower is, is learned from the tokens that the target drew: by the length of the context, by the
follower's share of it, by what a longer context says, and by whether it is of the same text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from worker.drafters.suffix.index import SuffixIndex
from worker.drafters.suffix.memory import CONTEXT, INDEX_BYTES, TokenKind
from worker.engine.host.sources import CompiledSource
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter

_MAX_IDLE_GROUPS = 64  # groups without a sequence that are remembered; more keep one prompt each

_OUTPUT = bytes([TokenKind.OUTPUT])

Ids = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt in the index, with all sequences that have it."""

    ids: Ids
    writer: int
    first: int  # the tokens before are in the index as those of an earlier prompt
    shared: int = 0  # leading tokens that later prompts have in the index as those of this one
    sequences: int = 0
    lasting: bool = False  # a sequence has finished: the index keeps it

    def common_length(self, ids: Ids) -> int:
        """Return how many leading tokens it has in common with another prompt."""
        pairs = enumerate(zip(self.ids, ids, strict=False))
        return next((place for place, (one, other) in pairs if one != other), min(len(self.ids), len(ids)))


@dataclass(slots=True, eq=False)
class _Group:
    """The sequences that may draft from each other's text."""

    number: int
    prompts: dict[Ids, _Prompt] = field(default_factory=dict)  # of the sequences that it has
    latest: _Prompt | None = None

    def prompt(self, ids: Ids, writer: int) -> tuple[_Prompt, int]:
        """Return a prompt, and how many of its leading tokens are in the index."""
        known = self.prompts.get(ids)
        if known is not None:
            return known, len(ids)
        first = 0
        if self.latest is not None:
            first = self.latest.common_length(ids)
            self.latest.shared = max(self.latest.shared, first)
        self.latest = self.prompts[ids] = _Prompt(ids, writer, first)
        return self.latest, first


@dataclass(slots=True, eq=False)
class _Text:
    """What the index has of a sequence."""

    group: _Group
    prompt: _Prompt
    row: int
    first: int  # the first token that it reads to count it
    read: int  # tokens that it has read
    forced: set[int] = field(default_factory=set)  # positions of tokens still to be read that a grammar forced

    def kinds(self, end: int) -> bytes | bytearray:
        """Return the kinds of the tokens up to `end` that it has not read."""
        prompt = len(self.prompt.ids)
        if self.read >= prompt and not self.forced:  # as most often
            return _OUTPUT * (end - self.read)
        starts = (TokenKind.CONTEXT_ONLY, self.first), (TokenKind.PROMPT, prompt), (TokenKind.OUTPUT, end)
        kinds = bytearray()
        for kind, before in starts:
            kinds += bytes([kind]) * (before - self.read - len(kinds))
        for position in self.forced:
            kinds[position - self.read] = TokenKind.FORCED
        return kinds


class SuffixDrafter:
    """Drafts from the prompts and outputs of all sequences of a group, each sequence's own among them."""

    name = "suffix"

    def __init__(self, max_bytes: int = INDEX_BYTES) -> None:
        """Keep what texts said in at most `max_bytes`; the oldest is forgotten."""
        self._index = SuffixIndex(max_bytes)
        self._texts: dict[int, _Text] = {}  # by number of the sequence
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()
        self._numbers = count(1)  # of groups and writers
        self._forest: Forest | None = None  # whose sequences were read
        self._rows: IntArray = np.empty(0, np.int64)  # of its trees

    @property
    def forward_free(self) -> Drafter:
        """All of it: it runs no forward."""
        return self

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer what followed the longest context of each node, and then of shorter ones."""
        return Candidates(*self._index.lookup(self._rows_of(forest), forest, frontier))

    def source(self, forest: Forest, roots: IntArray) -> CompiledSource | None:
        """Return where C finds what `expand` offers: trees grow in one call."""
        return self._index.source(self._rows_of(forest))

    def _rows_of(self, forest: Forest) -> IntArray:
        """Return the rows of the trees in the index, which has read their sequences."""
        if forest is not self._forest:
            self._rows = self._read(forest.sequences)
            self._forest = forest
        return self._rows

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return 0: reading takes no forward."""
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Note which of the emitted tokens a grammar forced. Tokens are read when the next ones are asked for."""
        if not len(path) or not forest.forced[path].any():
            return
        sequence = forest.sequences[tree]
        first = len(sequence.ids) - len(emitted)
        places = np.flatnonzero(forest.forced[path])
        self._text(sequence).forced |= {first + place for place in places.tolist() if place < len(emitted)}

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence.

        If it finished, its group keeps what it said; else only what its prompt has in common with others.
        """
        self._forest = None
        done = sequence.finish_reason is not None
        if done and sequence.group is not None:
            self._read([sequence])
        text = self._texts.pop(sequence.number, None)
        if text is None:
            return
        prompt, group = text.prompt, text.group
        prompt.sequences -= 1
        prompt.lasting |= done
        if not done and sequence.group is not None:
            self._retract(sequence, text)
        self._index.end(text.row)
        if not prompt.sequences:
            del group.prompts[prompt.ids]
            if group.latest is prompt and not prompt.lasting:
                group.latest = None
        self._limit_groups()

    def _read(self, sequences: Iterable[Sequence]) -> IntArray:
        """Read what the sequences have that the index has not; return their rows in the index."""
        rows: list[int] = []
        behind: list[int] = []
        counts: list[int] = []
        tokens: list[int] = []
        kinds = bytearray()
        for sequence in sequences:
            text = self._texts.get(sequence.number) or self._text(sequence)
            rows.append(text.row)
            length = len(sequence.ids)
            if length == text.read:
                continue
            behind.append(text.row)
            counts.append(length - text.read)
            tokens += sequence.ids[text.read :]
            kinds += text.kinds(length)
            text.read = length
            if text.forced:
                text.forced.clear()
        if behind:
            self._index.read(behind, counts, tokens, kinds)
        return np.array(rows, np.int64)

    def _text(self, sequence: Sequence) -> _Text:
        """Return what the index has of a sequence, at first the place from which it is to be read."""
        text = self._texts.get(sequence.number)
        if text is not None:
            return text
        group = self._group(sequence.group)
        prompt, first = group.prompt(tuple(sequence.ids[: sequence.num_prompt]), next(self._numbers))
        prompt.sequences += 1
        row = self._index.start(group.number, prompt.writer, next(self._numbers))
        text = self._texts[sequence.number] = _Text(group, prompt, row, first, max(first - CONTEXT, 0))
        return text

    def _group(self, key: Hashable) -> _Group:
        """Return a group by its key; None: a new one that no other sequence is in."""
        if key is None:
            return _Group(next(self._numbers))
        if key not in self._groups:
            self._groups[key] = _Group(next(self._numbers))
        self._groups.move_to_end(key)
        return self._groups[key]

    def _limit_groups(self) -> None:
        """Forget the groups that had no sequence for longest."""
        idle = [key for key, group in self._groups.items() if not group.prompts]
        for key in idle[: max(len(idle) - _MAX_IDLE_GROUPS, 0)]:
            del self._groups[key]

    def _retract(self, sequence: Sequence, text: _Text) -> None:
        """Take back what the index has of a sequence; of its prompt, what no other prompt shares."""
        prompt = text.prompt
        kept = max(prompt.first, prompt.shared)
        if prompt.sequences or prompt.lasting:
            kept = len(prompt.ids)
        kept = min(kept, text.read)
        kinds = bytearray([TokenKind.CONTEXT_ONLY]) * kept
        kinds += bytes([TokenKind.RETRACTED]) * (text.read - kept)
        self._index.restart(text.row)
        self._index.read([text.row], [text.read], sequence.ids[: text.read], kinds)
