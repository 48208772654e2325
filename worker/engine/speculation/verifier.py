"""Verify draft trees: keep the path on which every draft token is the target's own draw.

Sample and match: at each node the target draws its token as plain decoding would, and the draft is accepted where it is
equal. So texts follow exactly the target's law, and a seeded text is the one that plain decoding writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from worker.engine.sampling.sampling import Sampling, argmax, draw
from worker.engine.segments import IntArray
from worker.engine.speculation.draft_tree import Forest


@dataclass(frozen=True, slots=True)
class AcceptedPath:
    """What the target accepted of one tree."""

    path: IntArray  # accepted draft nodes in order of depth, without the root
    bonus: int  # the target's own token after them; -1: the logits there are NaN


def walk(forest: Forest, logits: Tensor, rows: IntArray) -> list[AcceptedPath]:
    """Walk every tree of the batch along the target's draws.

    `rows[node]` is the node's row in `logits` [rows, vocab]. Greedy trees share one argmax and one transfer. Trees with
    noise or penalties draw lazily: one round per depth, only on the rows that they reach.
    """
    children = {
        (int(parent), int(token)): node
        for node, (parent, token) in enumerate(zip(forest.parent, forest.token, strict=True))
        if parent >= 0
    }
    walks = [_Walk(root) for root in range(len(forest.sequences))]
    greedy = [w for w in walks if _is_argmax(forest.sequences[w.root].sampling)]
    if greedy:
        draws = argmax(logits).tolist()
        for w in greedy:
            while w.advance(draws[rows[w.node]], children):
                pass
    moving = [w for w in walks if not _is_argmax(forest.sequences[w.root].sampling)]
    while moving:
        draws = _draw_at([w.node for w in moving], forest, logits, rows)
        moving = [w for w, token in zip(moving, draws, strict=True) if w.advance(token, children)]
    return [AcceptedPath(np.array(w.path, np.int64), w.bonus) for w in walks]


def _is_argmax(sampling: Sampling) -> bool:
    """Return whether the draw is the argmax of the raw logits."""
    return sampling.greedy and not sampling.adjusted


class _Walk:
    """The path of one tree's draws from its root."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.node = root
        self.path: list[int] = []
        self.bonus = -1

    def advance(self, token: int, children: dict[tuple[int, int], int]) -> bool:
        """Step to the child with the drawn token; without one, keep the token as bonus and return False."""
        child = children.get((self.node, token))
        if child is None:
            self.bonus = token
            return False
        self.path.append(child)
        self.node = child
        return True


def _draw_at(nodes: list[int], forest: Forest, logits: Tensor, rows: IntArray) -> list[int]:
    trees = forest.tree[nodes]
    positions = forest.lengths[trees] + forest.depth[nodes]
    adjustments = forest.adjustments(np.array(nodes))
    tokens: list[int] = draw(logits, forest.parameters[trees], positions, rows[nodes], adjustments).tolist()
    return tokens
