"""Track where each sequence stands in the KV slots of a draft network, and the rows that a frontier becomes there.

A slot lags behind its text: the first layer of a step feeds whatever committed tokens it has not seen, but for what
texts have in common, which is fed once. The rows of a tree lie behind them until the walk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from worker.engine.scheduler import common_prefix_length
from worker.engine.segments import BoolArray, IntArray, Segment, chain
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Forest

MAX_CATCH_UP_ROWS = 512  # committed tokens fed in one forward
_ALIKE = 16  # tokens that two texts must have in common, at least, for it to be worth a copy

Feed = Callable[[Segment], object]  # runs rows whose outputs nobody asks for
Share = Callable[[int, int, int], None]  # source slot, target slot, entries


@dataclass(slots=True, eq=False)
class DraftSlot:
    """One sequence's place in its slot."""

    sequence: Sequence
    cached: int = 0  # committed tokens in the slot
    nodes: list[int] = field(default_factory=list)  # forest nodes whose keys lie behind them, in KV order


class DraftSlots:
    """The lanes of all sequences that a network has drafted for."""

    def __init__(self) -> None:
        """Start with none."""
        self._slots: dict[int, DraftSlot] = {}
        self._by_prefix: defaultdict[tuple[int, ...], list[DraftSlot]] = defaultdict(list)  # by their first tokens

    def of(self, sequence: Sequence) -> DraftSlot:
        """Return a sequence's slot."""
        slot = self._slots.get(id(sequence))
        if slot is None:
            slot = self._slots[id(sequence)] = DraftSlot(sequence)
            self._by_prefix[_prefix_key(sequence)].append(slot)
        return slot

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return the committed tokens that its slot lacks and that no other slot has."""
        slot = self._slots.get(id(sequence))
        if slot is not None and slot.cached:
            return len(sequence.ids) - slot.cached
        source, alike = self._alike(sequence)
        return len(sequence.ids) - (min(alike, source.cached) if source else 0)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        slot = self._slots.pop(id(sequence), None)
        if slot is not None:
            beginning = _prefix_key(sequence)
            self._by_prefix[beginning].remove(slot)
            if not self._by_prefix[beginning]:
                del self._by_prefix[beginning]

    def rest(self, sequences: Seq[Sequence], feed: Feed, share: Share) -> list[Segment]:
        """Return the rows of the committed tokens that are left of each; the newest is the root of this step's tree.

        What several texts begin with is fed once, and what does not fit beside other rows is fed now.
        """
        for sequence in sequences:
            self._share(sequence, feed, share)
            self._feed(self.of(sequence), len(sequence.ids) - MAX_CATCH_UP_ROWS, feed)
        return [self._rest(self.of(sequence)) for sequence in sequences]

    def below(self, forest: Forest, sequence: Sequence, nodes: IntArray) -> Segment:
        """Return the rows of draft nodes, which see the committed text and their ancestors."""
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

    def _share(self, sequence: Sequence, feed: Feed, share: Share) -> None:
        """Let a slot that is still empty begin with what another one has, or is about to read."""
        slot = self.of(sequence)
        if slot.cached:
            return
        source, alike = self._alike(sequence)
        if source is not None:
            self._feed(source, alike, feed)
            share(source.sequence.slot, sequence.slot, alike)
            slot.cached = alike

    def _alike(self, sequence: Sequence) -> tuple[DraftSlot | None, int]:
        """Return the other slot with the longest common prefix, and its length; each text keeps one token to read.

        What another has fed already counts before what it would have to feed.
        """
        best: tuple[DraftSlot | None, int] = (None, 0)
        for slot in self._by_prefix.get(_prefix_key(sequence), ()):
            if slot.sequence is not sequence and not slot.nodes:
                most = min(len(slot.sequence.ids), len(sequence.ids)) - 1
                alike = min(common_prefix_length(slot.sequence.ids, sequence.ids), most)
                if alike >= _ALIKE and (
                    best[0] is None or (min(alike, slot.cached), alike) > (best[0].cached, best[1])
                ):
                    best = (slot, alike)
        return best

    @staticmethod
    def _feed(slot: DraftSlot, upto: int, feed: Feed) -> None:
        """Feed the tokens before `upto`, forward by forward."""
        while slot.cached < upto:
            ids = slot.sequence.ids[slot.cached : min(slot.cached + MAX_CATCH_UP_ROWS, upto)]
            feed(chain(slot.sequence.slot, slot.cached, ids, keep_last=True))
            slot.cached += len(ids)

    @staticmethod
    def _rest(slot: DraftSlot) -> Segment:
        sequence = slot.sequence
        segment = chain(sequence.slot, slot.cached, sequence.ids[slot.cached :], keep_last=True)
        slot.cached = len(sequence.ids)
        slot.nodes.clear()
        return segment


def _prefix_key(sequence: Sequence) -> tuple[int, ...]:
    return tuple(sequence.ids[: min(_ALIKE, sequence.num_prompt)])


def by_slot(forest: Forest, frontier: IntArray) -> list[IntArray]:
    """Return the frontier's places, tree by tree, in the order of the slots."""
    trees = forest.tree[frontier]
    in_slot_order = sorted(set(trees.tolist()), key=lambda tree: forest.sequences[tree].slot)
    return [np.flatnonzero(trees == tree) for tree in in_slot_order]


def _ancestors(forest: Forest, nodes: list[int]) -> BoolArray:
    """Return [n, n]: which of `nodes` (parents first) each one sees: its ancestors and itself."""
    place = {node: i for i, node in enumerate(nodes)}
    seen = np.eye(len(nodes), dtype=np.bool_)
    for i, node in enumerate(nodes):
        parent = place.get(int(forest.parent[node]))
        if parent is not None:
            seen[i] |= seen[parent]
    return seen
