"""Lanes: where each sequence stands in the KV slots of a draft network, and the rows that a frontier becomes there.

A slot lags behind its text: the first layer of a step feeds whatever committed tokens it has not seen, but for what
texts have in common, which is fed once. The rows of a tree lie behind them until the walk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from worker.engine.scheduler import common
from worker.engine.segments import BoolArray, IntArray, Segment, chain
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Forest

CATCH_UP_ROWS = 512  # committed tokens fed in one forward
_ALIKE = 16  # tokens that two texts must have in common, at least, for it to be worth a copy

Feed = Callable[[Segment], object]  # runs rows whose outputs nobody asks for
Share = Callable[[int, int, int], None]  # source slot, target slot, entries


@dataclass(slots=True, eq=False)
class Lane:
    """One sequence's place in its slot."""

    sequence: Sequence
    cached: int = 0  # committed tokens in the slot
    nodes: list[int] = field(default_factory=list)  # forest nodes whose keys lie behind them, in KV order


class Lanes:
    """The lanes of all sequences that a network has drafted for."""

    def __init__(self) -> None:
        """Start with none."""
        self._lanes: dict[int, Lane] = {}
        self._beginnings: defaultdict[tuple[int, ...], list[Lane]] = defaultdict(list)  # by their first tokens

    def of(self, sequence: Sequence) -> Lane:
        """Return a sequence's lane."""
        lane = self._lanes.get(id(sequence))
        if lane is None:
            lane = self._lanes[id(sequence)] = Lane(sequence)
            self._beginnings[_beginning(sequence)].append(lane)
        return lane

    def behind(self, sequence: Sequence) -> int:
        """Return the committed tokens that its slot lacks and that no other slot has."""
        lane = self._lanes.get(id(sequence))
        if lane is not None and lane.cached:
            return len(sequence.ids) - lane.cached
        source, alike = self._alike(sequence)
        return len(sequence.ids) - (min(alike, source.cached) if source else 0)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        lane = self._lanes.pop(id(sequence), None)
        if lane is not None:
            beginning = _beginning(sequence)
            self._beginnings[beginning].remove(lane)
            if not self._beginnings[beginning]:
                del self._beginnings[beginning]

    def rest(self, sequences: Seq[Sequence], feed: Feed, share: Share) -> list[Segment]:
        """Return the rows of the committed tokens that are left of each; the newest is the root of this step's tree.

        What several texts begin with is fed once, and what does not fit beside other rows is fed now.
        """
        for sequence in sequences:
            self._share(sequence, feed, share)
            self._feed(self.of(sequence), len(sequence.ids) - CATCH_UP_ROWS, feed)
        return [self._rest(self.of(sequence)) for sequence in sequences]

    def below(self, forest: Forest, sequence: Sequence, nodes: IntArray) -> Segment:
        """Return the rows of draft nodes, which see the committed text and their ancestors."""
        lane = self.of(sequence)
        earlier = len(lane.nodes)
        lane.nodes += nodes.tolist()
        return Segment(
            slot=sequence.slot,
            prefix=lane.cached,
            start=lane.cached + earlier,
            ids=forest.token[nodes],
            positions=len(sequence.ids) - 1 + forest.depth[nodes],
            visible=_ancestors(forest, lane.nodes)[earlier:],
            keep=np.arange(len(nodes)),
        )

    def _share(self, sequence: Sequence, feed: Feed, share: Share) -> None:
        """Let a slot that is still empty begin with what another one has, or is about to read."""
        lane = self.of(sequence)
        if lane.cached:
            return
        source, alike = self._alike(sequence)
        if source is not None:
            self._feed(source, alike, feed)
            share(source.sequence.slot, sequence.slot, alike)
            lane.cached = alike

    def _alike(self, sequence: Sequence) -> tuple[Lane | None, int]:
        """Return the other lane that has most in common with a sequence, and how many tokens; each keeps one to read.

        What another has fed already counts before what it would have to feed.
        """
        best: tuple[Lane | None, int] = (None, 0)
        for lane in self._beginnings.get(_beginning(sequence), ()):
            if lane.sequence is not sequence and not lane.nodes:
                most = min(len(lane.sequence.ids), len(sequence.ids)) - 1
                alike = min(common(lane.sequence.ids, sequence.ids), most)
                if alike >= _ALIKE and (
                    best[0] is None or (min(alike, lane.cached), alike) > (best[0].cached, best[1])
                ):
                    best = (lane, alike)
        return best

    @staticmethod
    def _feed(lane: Lane, upto: int, feed: Feed) -> None:
        """Feed the tokens before `upto`, forward by forward."""
        while lane.cached < upto:
            ids = lane.sequence.ids[lane.cached : min(lane.cached + CATCH_UP_ROWS, upto)]
            feed(chain(lane.sequence.slot, lane.cached, ids, keep_last=True))
            lane.cached += len(ids)

    @staticmethod
    def _rest(lane: Lane) -> Segment:
        sequence = lane.sequence
        segment = chain(sequence.slot, lane.cached, sequence.ids[lane.cached :], keep_last=True)
        lane.cached = len(sequence.ids)
        lane.nodes.clear()
        return segment


def _beginning(sequence: Sequence) -> tuple[int, ...]:
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
