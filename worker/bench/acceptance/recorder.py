"""Record an acceptance profile of a real pair: what the draft offers while a known text is decoded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from worker.bench.acceptance.profile import FORMAT
from worker.bench.acceptance.target_path import TargetPath
from worker.engine.host.nodes import FloatArray
from worker.engine.segments import BoolArray, IntArray
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter

_SAMPLES = 16  # stored of each class and depth, evenly spaced by the first probability
_MIN_NODES = 100  # on the path of a depth; fewer say too little about it


class ProfileRecorder:
    """A drafter that passes on what another one offers and records it."""

    def __init__(self, drafter: Drafter, texts: Sequence[Sequence[int]]) -> None:
        """Record `drafter`; `texts` are the outputs of the sequences with the keys 0, 1, …"""
        self.name, self.forward_free = drafter.name, None
        self.num_uncached_tokens, self.commit, self.drop = drafter.num_uncached_tokens, drafter.commit, drafter.drop
        self._drafter = drafter
        self._path = TargetPath(texts)
        self._classes: defaultdict[int, list[IntArray]] = defaultdict(list)  # by depth
        self._shapes: defaultdict[int, list[FloatArray]] = defaultdict(list)
        self._off_path: defaultdict[int, list[FloatArray]] = defaultdict(list)

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Return the drafter's candidates; record them with the rank of the target's token."""
        offered = self._drafter.expand(forest, frontier)
        self._record(int(forest.depth[frontier[0]]), offered, *self._path.follow(forest, frontier))
        return offered

    def _record(self, depth: int, offered: Candidates, on: BoolArray, truth: IntArray) -> None:
        width = offered.tokens.shape[1]
        order = np.argsort(-offered.probabilities, axis=1, kind="stable")
        shapes = np.take_along_axis(offered.probabilities, order, axis=1)
        right = (np.take_along_axis(offered.tokens, order, axis=1) == truth[:, None]) & (shapes > 0)
        classes = np.where(right.any(axis=1), right.argmax(axis=1), width)
        known = on & (truth >= 0)
        self._classes[depth].append(classes[known])
        self._shapes[depth].append(shapes[known])
        self._off_path[depth].append(shapes[~on])

    def as_json(self, name: str, card: Mapping[str, Any]) -> dict[str, Any]:
        """Return the profile for its file. Depths below the first one with too few nodes on the path are left out."""
        depths: list[dict[str, Any]] = []
        for depth in sorted(self._classes):
            classes, shapes = np.concatenate(self._classes[depth]), np.concatenate(self._shapes[depth])
            if depths and len(classes) < _MIN_NODES:
                break
            width = shapes.shape[1]
            depths.append(
                {
                    "counts": np.bincount(classes, minlength=width + 1).tolist(),
                    "shapes": [_spaced(shapes[classes == rank]) for rank in range(width + 1)],
                    "off_path": _spaced(np.concatenate(self._off_path[depth]), 2 * _SAMPLES),
                }
            )
        return {"format": FORMAT, "name": name, "card": dict(card), "depths": depths}


def _spaced(shapes: FloatArray, count: int = _SAMPLES) -> list[list[float]]:
    """Return `count` of the shapes at most: in the middle of equal parts, by the first probability."""
    ordered = shapes[np.argsort(-shapes[:, 0], kind="stable")]
    if len(ordered) > count:
        ordered = ordered[((np.arange(count) + 0.5) * len(ordered) / count).astype(np.int64)]
    return [[round(float(p), 4) for p in shape] for shape in ordered]
