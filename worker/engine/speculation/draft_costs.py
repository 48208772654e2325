"""What drafts cost and earn: times measured at start-up and corrected by every step, and what the drafts brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from worker.engine.speculation.cost_model import load_class

_CAUGHT_UP = 16  # tokens that a drafter may be behind for a layer to be an ordinary one
_TIME_WEIGHT = 0.1  # of a new sample in a running time
_SHARE_WEIGHT = 0.05  # of a new layer in what best children are worth
_FADE = 0.002  # so fast is that forgotten of a depth which is not drafted
_DEPTHS = 4  # told apart: 0, 1, 2, and deeper


@dataclass(frozen=True, slots=True)
class DraftTimes:
    """What a drafter's forwards take on this machine."""

    layer_ms: Mapping[int, float]  # by the nodes that a layer expands
    row_ms: float  # of reading one committed token, many together

    def as_json(self) -> dict[str, Any]:
        """Return the times as JSON."""
        by_nodes = {str(nodes): round(ms, 4) for nodes, ms in sorted(self.layer_ms.items())}
        return {"layer_ms_by_nodes": by_nodes, "row_ms": round(self.row_ms, 5)}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Return the times that `as_json` told."""
        by_nodes = {int(nodes): float(ms) for nodes, ms in said["layer_ms_by_nodes"].items()}
        return cls(by_nodes, float(said["row_ms"]))


class DraftCosts:
    """What a drafter costs and earns, as measured while decoding."""

    def __init__(self, times: DraftTimes | None = None) -> None:
        """Start with what was measured before; without that, the layers are free until one was drafted."""
        known = times.layer_ms if times else {}
        self._layer_ms = {load_class(nodes): ms for nodes, ms in known.items()}  # by load class of the nodes expanded
        self.row_ms = times.row_ms if times else 0.0  # of reading one committed token, the drafter being far behind
        self._reads = round(1 / _TIME_WEIGHT) if times else 0  # that the time of a row is the mean of
        self.earned = 0.0  # tokens per tree and step, its own time deducted
        self._share = [1.0] * _DEPTHS  # of a node's value that its best child has, by the depth of the node

    def layer_ms(self, nodes: int) -> float:
        """Return the time of a layer; of a size never seen, that of the nearest smaller one."""
        known = [size for size in self._layer_ms if size <= load_class(nodes)]
        return self._layer_ms[max(known)] if known else 0.0

    def observe(self, nodes: int, layer_ms: float) -> None:
        """Learn from a layer that was drafted."""
        size = load_class(nodes)
        before = self._layer_ms.get(size, layer_ms)
        self._layer_ms[size] = before + _TIME_WEIGHT * (min(layer_ms, 2 * before) - before)

    def observe_growth(self, behind: int, layers: Sequence[int], ms: float) -> float:
        """Learn from a step's layers of so many nodes, before which so many committed tokens were read.

        Return the time that reading took: none if it was no more than every step brings.
        """
        known = [self.layer_ms(nodes) for nodes in layers]
        if behind > _CAUGHT_UP * max(layers[:1], default=1):
            reading_ms = max(ms - sum(known), 0.0)
            self._reads += 1
            self.row_ms += max(_TIME_WEIGHT, 1 / self._reads) * (reading_ms / behind - self.row_ms)
            return reading_ms
        if not all(known):  # a layer's time hardly depends on its nodes
            known = [1.0] * len(layers)
        for nodes, part in zip(layers, known, strict=True):
            self.observe(nodes, ms * part / sum(known))
        return 0.0

    def share(self, depth: int) -> float:
        """Return how much of a node's value its best child is likely to have; the root's depth is 0."""
        return self._share[min(depth, len(self._share) - 1)]

    def observe_share(self, depth: int, best_children: float, parents: float) -> None:
        """Learn from the values of nodes of a depth, taken together, and those of the best child of each.

        What is known of deeper ones fades a little, for it may not be tried again otherwise.
        """
        place = min(depth, len(self._share) - 1)
        self._share[place] += _SHARE_WEIGHT * (best_children / parents - self._share[place])
        for deeper in range(place + 1, len(self._share)):
            self._share[deeper] += _FADE * (1.0 - self._share[deeper])

    def observe_earned(self, tokens: float) -> None:
        """Learn what one tree brought in one step over plain decoding."""
        self.earned += _TIME_WEIGHT * (tokens - self.earned)

    def as_json(self) -> dict[str, Any]:
        """Return what is known by now."""
        return DraftTimes({2**size: ms for size, ms in self._layer_ms.items()}, self.row_ms).as_json()
