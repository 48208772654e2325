"""Track which tokens of each sequence are in the KV slots of a draft network, and build its input rows.

The draft KV lags behind: the first layer of a step feeds all committed tokens that are not cached yet. A prefix that
sequences have in common is fed once and copied. The rows of a draft tree follow the committed ones until verification.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from worker.engine.kv.prefix_tree import common_prefix_length
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
    cached: int = 0  # committed tokens in the slot
    nodes: list[int] = field(default_factory=list)  # forest nodes whose KV entries follow them, in KV order


SlotState = list[tuple[DraftSlot, int, int]]  # slots, their committed tokens, and the number of their draft nodes


class DraftSlots:
    """The KV slots of all sequences that a network has drafted for."""

    def __init__(self) -> None:
        self._slots: dict[int, DraftSlot] = {}
        self._by_prefix: defaultdict[tuple[int, ...], list[DraftSlot]] = defaultdict(list)  # by their first tokens

    def of(self, sequence: Sequence) -> DraftSlot:
        """Return a sequence's slot."""
        slot = self._slots.get(id(sequence))
        if slot is None:
            slot = self._slots[id(sequence)] = DraftSlot(sequence, sequence.slot)
            self._by_prefix[_prefix_key(sequence)].append(slot)
        return slot

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return the committed tokens that must be fed: not in the sequence's slot, and not in one to copy from."""
        slot = self._slots.get(id(sequence))
        if slot is not None and slot.cached:
            return len(sequence.ids) - slot.cached
        source, length = self._longest_shared_prefix(sequence)
        return len(sequence.ids) - (min(length, source.cached) if source else 0)

    def drop(self, sequence: Sequence) -> int | None:
        """Forget a sequence; return the number of its slot, None if nothing was drafted for it."""
        slot = self._slots.pop(id(sequence), None)
        if slot is None:
            return None
        key = _prefix_key(sequence)
        self._by_prefix[key].remove(slot)
        if not self._by_prefix[key]:
            del self._by_prefix[key]
        return slot.number

    def state(self, sequences: Seq[Sequence]) -> SlotState:
        """Return what the slots of sequences hold, for `restore`."""
        return [(slot, slot.cached, len(slot.nodes)) for slot in map(self.of, sequences)]

    @staticmethod
    def restore(state: SlotState) -> list[tuple[int, int]]:
        """Forget what was added since; return the number of each slot, and the entries that it keeps."""
        for slot, cached, nodes in state:
            slot.cached = cached
            del slot.nodes[nodes:]
        return [(slot.number, slot.cached + len(slot.nodes)) for slot, _, _ in state]

    def catch_up(self, sequences: Seq[Sequence], feed: Feed, copy_prefix: CopyPrefix) -> list[Segment]:
        """Return the rows of each sequence's uncached tokens. The newest token is the root of this step's tree.

        Shared prefixes, and tokens beyond `MAX_CATCH_UP_ROWS`, are fed at once.
        """
        for sequence in sequences:
            self._share_prefix(sequence, feed, copy_prefix)
            self._feed(self.of(sequence), len(sequence.ids) - MAX_CATCH_UP_ROWS, feed)
        return [self._uncached_rows(self.of(sequence)) for sequence in sequences]

    def tree_rows(self, forest: Forest, sequence: Sequence, nodes: IntArray) -> Segment:
        """Return the rows of draft nodes, which attend to the committed tokens and their ancestors."""
        slot = self.of(sequence)
        earlier = len(slot.nodes)
        slot.nodes += nodes.tolist()
        return Segment(
            slot=sequence.slot,
            prefix=slot.cached,
            start=slot.cached + earlier,
            ids=forest.token[nodes],
            positions=len(sequence.ids) - 1 + forest.depth[nodes],
            visible=_ancestors(forest, slot.nodes)[earlier:],
            keep=np.arange(len(nodes)),
        )

    def _share_prefix(self, sequence: Sequence, feed: Feed, copy_prefix: CopyPrefix) -> None:
        """Fill an empty slot with a prefix that another slot has, or is about to feed."""
        slot = self.of(sequence)
        if slot.cached:
            return
        source, length = self._longest_shared_prefix(sequence)
        if source is not None:
            self._feed(source, length, feed)
            copy_prefix(source.sequence.slot, sequence.slot, length)
            slot.cached = length

    def _longest_shared_prefix(self, sequence: Sequence) -> tuple[DraftSlot | None, int]:
        """Return the other slot with the longest common prefix, and its length; each sequence keeps one token to feed.

        Tokens that the other slot has cached count before those that it would have to feed.
        """
        best: tuple[DraftSlot | None, int] = (None, 0)
        for slot in self._by_prefix.get(_prefix_key(sequence), ()):
            if slot.sequence is not sequence and not slot.nodes:
                limit = min(len(slot.sequence.ids), len(sequence.ids)) - 1
                length = min(common_prefix_length(slot.sequence.ids, sequence.ids), limit)
                if length >= _MIN_SHARED_PREFIX and (
                    best[0] is None or (min(length, slot.cached), length) > (best[0].cached, best[1])
                ):
                    best = (slot, length)
        return best

    @staticmethod
    def _feed(slot: DraftSlot, end: int, feed: Feed) -> None:
        """Feed the tokens before `end`, at most `MAX_CATCH_UP_ROWS` per forward."""
        while slot.cached < end:
            ids = slot.sequence.ids[slot.cached : min(slot.cached + MAX_CATCH_UP_ROWS, end)]
            feed(chain(slot.sequence.slot, slot.cached, ids, keep_last=True))
            slot.cached += len(ids)

    @staticmethod
    def _uncached_rows(slot: DraftSlot) -> Segment:
        sequence = slot.sequence
        segment = chain(sequence.slot, slot.cached, sequence.ids[slot.cached :], keep_last=True)
        slot.cached = len(sequence.ids)
        slot.nodes.clear()
        return segment


def _prefix_key(sequence: Sequence) -> tuple[int, ...]:
    return tuple(sequence.ids[: min(_MIN_SHARED_PREFIX, sequence.num_prompt)])


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
