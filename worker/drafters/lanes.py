"""Lanes: where each sequence stands in the KV slots of a draft network, and the rows that a frontier becomes there.

drafting -> [lanes] -> model, head.  A slot lags behind its text: the first layer of a step feeds whatever committed
tokens it has not seen. The rows of a tree lie behind them until the walk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from worker.engine.draft_tree import Forest
from worker.engine.rows import BoolArray, IntArray, Segment, chain
from worker.engine.sequence import Sequence

CATCH_UP_ROWS = 512  # committed tokens fed in one forward


@dataclass(slots=True)
class Lane:
    """One sequence's place in its slot."""

    cached: int = 0  # committed tokens in the slot
    nodes: list[int] = field(default_factory=list)  # forest nodes whose keys lie behind them, in KV order


class Lanes:
    """The lanes of all sequences that a network has drafted for."""

    def __init__(self) -> None:
        """Start with none."""
        self._lanes: dict[int, Lane] = {}

    def of(self, sequence: Sequence) -> Lane:
        """Return a sequence's lane."""
        return self._lanes.setdefault(id(sequence), Lane())

    def behind(self, sequence: Sequence) -> int:
        """Return the committed tokens that its slot lacks."""
        lane = self._lanes.get(id(sequence))
        return len(sequence.ids) - (lane.cached if lane else 0)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._lanes.pop(id(sequence), None)

    def late(self, sequence: Sequence) -> list[Segment]:
        """Return what must be fed, forward by forward, before the rest fits into one; it counts as fed."""
        lane = self.of(sequence)
        segments = []
        while len(sequence.ids) - lane.cached > CATCH_UP_ROWS:
            ids = sequence.ids[lane.cached : lane.cached + CATCH_UP_ROWS]
            segments.append(chain(sequence.slot, lane.cached, ids, keep_last=True))
            lane.cached += len(ids)
        return segments

    def rest(self, sequence: Sequence) -> Segment:
        """Return the rows of the committed tokens that are left; the newest is the root of this step's tree."""
        lane = self.of(sequence)
        segment = chain(sequence.slot, lane.cached, sequence.ids[lane.cached :], keep_last=True)
        lane.cached = len(sequence.ids)
        lane.nodes.clear()
        return segment

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
