"""Track which tokens of each sequence are in the KV slots of a draft network, and build its input rows.

The draft KV lags behind: the first layer of a step feeds all committed tokens that are not cached yet. A prefix that
sequences have in common is fed once and copied. The rows of a draft tree follow the committed ones until verification.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from worker.engine.kv.prefix_tree import PrefixTree
from worker.engine.segments import BoolArray, IntArray, Segment, chain
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Forest

MAX_CATCH_UP_ROWS = 512  # committed tokens fed in one forward
_MIN_SHARED_PREFIX = 16  # tokens: feeding a shorter common prefix twice is cheaper than tracking it

Feed = Callable[[Segment], object]  # runs rows whose outputs are not used
CopyPrefix = Callable[[int, int, int], None]  # source slot, target slot, number of KV entries


@dataclass(slots=True, eq=False)
class DraftSlot:
    """The KV slot of one sequence."""

    sequence: Sequence
    number: int  # of the slot
    cached: int = 0  # committed tokens that are in the slot, or were skipped before its first entry
    nodes: list[int] = field(default_factory=list)  # forest nodes whose KV entries follow them, in KV order


SlotState = list[tuple[DraftSlot, int, int]]  # slots, their committed tokens, and the number of their draft nodes


class DraftSlots:
    """The KV slots of all sequences that a network has drafted for."""

    def __init__(self, first_token: int = 0) -> None:
        """Skip the tokens before `first_token`, 0 or 1: the network has no row for them."""
        self._first_token = first_token
        self._slots: dict[int, DraftSlot] = {}
        self._fed: PrefixTree[DraftSlot] = PrefixTree()  # tokens that slots have cached
        self._known: PrefixTree[DraftSlot] = PrefixTree()  # tokens that slots are to be fed
        self._num_fed = 0  # how often a slot got its first tokens
        self._shareable: dict[int, tuple[int, int]] = {}  # (`_num_fed`, tokens to share) of sequences without a slot

    def of(self, sequence: Sequence) -> DraftSlot:
        """Return a sequence's slot."""
        slot = self._slots.get(id(sequence))
        if slot is None:
            slot = self._slots[id(sequence)] = DraftSlot(sequence, sequence.slot)
            self._shareable.pop(id(sequence), None)
        return slot

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return the committed tokens that must be fed: not in the sequence's slot, and not in one to copy from."""
        slot = self._slots.get(id(sequence))
        if slot is not None and slot.cached:
            self._keep(slot, slot.cached)
            return len(sequence.ids) - slot.cached
        looked_up, length = self._shareable.get(id(sequence), (-1, 0))
        if looked_up != self._num_fed:
            _, length = _source(self._fed, sequence)
            self._shareable[id(sequence)] = self._num_fed, length
        return len(sequence.ids) - length

    def drop(self, sequence: Sequence) -> int | None:
        """Forget a sequence; return the number of its slot, None if nothing was drafted for it."""
        self._shareable.pop(id(sequence), None)
        slot = self._slots.pop(id(sequence), None)
        if slot is None:
            return None
        self._fed.remove(slot)
        self._known.remove(slot)
        return slot.number

    def state(self, sequences: Seq[Sequence]) -> SlotState:
        """Return what the slots of sequences hold, for `restore`."""
        return [(slot, slot.cached, len(slot.nodes)) for slot in map(self.of, sequences)]

    def restore(self, state: SlotState) -> list[tuple[int, int]]:
        """Forget what was added since; return the number of each slot, and the entries that it keeps."""
        for slot, cached, nodes in state:
            slot.cached = cached
            del slot.nodes[nodes:]
            if not cached:
                self._fed.remove(slot)
                self._known.remove(slot)
            elif self._fed.length(slot) > cached:
                self._fed.shrink(slot, cached)
        return [(slot.number, self._entries(slot.cached) + len(slot.nodes)) for slot, _, _ in state]

    def catch_up(
        self, sequences: Seq[Sequence], feed: Feed, copy_prefix: CopyPrefix, max_rows: int = MAX_CATCH_UP_ROWS
    ) -> list[Segment]:
        """Return the rows of each sequence's uncached tokens. The newest token is the root of this step's tree.

        Shared prefixes, and tokens beyond the last `max_rows`, are fed at once.
        """
        for sequence in sequences:
            self._share_prefix(sequence, feed, copy_prefix)
            self._feed(self.of(sequence), len(sequence.ids) - max_rows, feed)
        return [self._uncached_rows(self.of(sequence)) for sequence in sequences]

    def tree_rows(self, forest: Forest, sequence: Sequence, nodes: IntArray) -> Segment:
        """Return the rows of draft nodes, which attend to the committed tokens and their ancestors."""
        slot = self.of(sequence)
        earlier, entries = len(slot.nodes), self._entries(slot.cached)
        slot.nodes += nodes.tolist()
        return Segment(
            slot=sequence.slot,
            prefix=entries,
            start=entries + earlier,
            ids=forest.token[nodes],
            positions=len(sequence.ids) - 1 + forest.depth[nodes],
            visible=_ancestors(forest, slot.nodes)[earlier:],
            keep=np.arange(len(nodes)),
        )

    def _share_prefix(self, sequence: Sequence, feed: Feed, copy_prefix: CopyPrefix) -> None:
        """Fill an empty slot with a prefix that another slot has cached, or is about to feed."""
        slot = self.of(sequence)
        if slot.cached:
            return
        source, length = _source(self._fed, sequence)
        if source is None:
            source, length = _source(self._known, sequence)
        self._known.insert(slot, sequence.packed_ids(len(sequence.ids)), len(sequence.ids))
        if source is not None:
            self._feed(source, length, feed)
            copy_prefix(source.number, slot.number, self._entries(length))
            self._keep(slot, length)

    def _feed(self, slot: DraftSlot, end: int, feed: Feed) -> None:
        """Feed the tokens before `end`, at most `MAX_CATCH_UP_ROWS` per forward."""
        while slot.cached < end:
            upto = min(slot.cached + MAX_CATCH_UP_ROWS, end)
            feed(self._rows(slot, upto))
            self._keep(slot, upto)

    def _uncached_rows(self, slot: DraftSlot) -> Segment:
        segment = self._rows(slot, len(slot.sequence.ids))
        slot.cached = len(slot.sequence.ids)
        slot.nodes.clear()
        return segment

    def _rows(self, slot: DraftSlot, end: int) -> Segment:
        """Return the rows of the tokens before `end` that are not cached; their positions are those of the tokens.

        A text of skipped tokens alone has a row for the last one, which the next token's row overwrites.
        """
        start = max(slot.cached, min(self._first_token, end - 1))
        entry = max(start - self._first_token, 0)
        return chain(slot.number, entry, slot.sequence.ids[start:end], keep_last=True, position=start)

    def _entries(self, cached: int) -> int:
        """Return the KV entries of a slot with this number of committed tokens."""
        return max(cached - self._first_token, min(cached, 1))

    def _keep(self, slot: DraftSlot, cached: int) -> None:
        """Record the committed tokens that a slot has now."""
        self._num_fed += not slot.cached
        slot.cached = cached
        self._fed.insert(slot, slot.sequence.packed_ids(cached), cached)


def _source(tree: PrefixTree[DraftSlot], sequence: Sequence) -> tuple[DraftSlot | None, int]:
    """Return a slot of another sequence with the longest common prefix, and its length; None if it is short.

    Each sequence keeps one token to feed.
    """
    wanted = len(sequence.ids) - 1
    found = tree.longest(sequence.packed_ids(wanted), wanted)
    if found.length < _MIN_SHARED_PREFIX:
        return None, 0
    sources = (slot for slot in found.holders if slot.sequence is not sequence and not slot.nodes)
    source = next(sources, None)
    if source is None:
        return None, 0
    length = min(found.length, len(source.sequence.ids) - 1)
    return (source, length) if length >= _MIN_SHARED_PREFIX else (None, 0)


def by_slot(forest: Forest, frontier: IntArray) -> list[IntArray]:
    """Return the indices into `frontier` of each tree's nodes, in the order of the trees' slots."""
    trees = forest.tree[frontier]
    in_slot_order = sorted(set(trees.tolist()), key=lambda tree: forest.sequences[tree].slot)
    return [np.flatnonzero(trees == tree) for tree in in_slot_order]


def _ancestors(forest: Forest, nodes: list[int]) -> BoolArray:
    """Return the tree attention mask [n, n] of `nodes`, parents first: each node sees its ancestors and itself."""
    index = {node: i for i, node in enumerate(nodes)}
    seen = np.eye(len(nodes), dtype=np.bool_)
    for i, node in enumerate(nodes):
        parent = index.get(int(forest.parent[node]))
        if parent is not None:
            seen[i] |= seen[parent]
    return seen
