"""Costs of drafting (ms per layer and per token read) and its gain in tokens: calibrated, then learned from steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from worker.engine.speculation.constants import (
    BEST_CHILD_RECOVERY,
    BEST_CHILD_WEIGHT,
    DEPTH_CLASSES,
    LAYER_OUTLIER,
    MIN_CATCH_UP_TOKENS,
    TIME_WEIGHT,
)
from worker.engine.speculation.cost_model import load_class
from worker.engine.speculation.running_mean import RunningMean


@dataclass(frozen=True, slots=True)
class DraftTimes:
    """Times of a drafter's forwards on this machine, as calibrated."""

    layer_ms: Mapping[int, float]  # time of a layer by the number of nodes that it expands
    row_ms: float  # time per committed token when many are read together

    def as_json(self) -> dict[str, Any]:
        """Return the times for the calibration file."""
        by_nodes = {str(nodes): round(ms, 4) for nodes, ms in sorted(self.layer_ms.items())}
        return {"layer_ms_by_nodes": by_nodes, "row_ms": round(self.row_ms, 5)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the times that `as_json` wrote."""
        by_nodes = {int(nodes): float(ms) for nodes, ms in stored["layer_ms_by_nodes"].items()}
        return cls(by_nodes, float(stored["row_ms"]))


class DraftCosts:
    """Costs and gains of one drafting strategy, measured while decoding."""

    def __init__(self, times: DraftTimes | None = None) -> None:
        """Start from calibrated times; without them a layer counts as free until one was drafted."""
        calibrated = times.layer_ms if times else {}
        self._layer_ms = {
            load_class(nodes): RunningMean.settled(TIME_WEIGHT, ms) for nodes, ms in calibrated.items()
        }  # by load class of the nodes expanded
        self._row_ms = RunningMean.settled(TIME_WEIGHT, times.row_ms) if times else RunningMean(TIME_WEIGHT)
        self._gain = RunningMean.settled(TIME_WEIGHT, 0.0)
        # Best child's value over its parent's, by depth of the parent. It starts optimistic, so that layers are tried.
        self._best_child = [RunningMean.settled(BEST_CHILD_WEIGHT, 1.0) for _ in range(DEPTH_CLASSES)]

    @property
    def row_ms(self) -> float:
        """Time to read one committed token while catching up; 0 if it was never measured."""
        return self._row_ms.value

    @property
    def gain(self) -> float:
        """Tokens that one tree brings per step over plain decoding, with the step's own extra time deducted."""
        return self._gain.value

    def layer_ms(self, nodes: int) -> float:
        """Return the time of a layer; for a size never seen, that of the nearest smaller one."""
        known = [size for size in self._layer_ms if size <= load_class(nodes)]
        return self._layer_ms[max(known)].value if known else 0.0

    def observe(self, nodes: int, layer_ms: float) -> None:
        """Learn from a layer that expanded `nodes` nodes."""
        mean = self._layer_ms.setdefault(load_class(nodes), RunningMean.settled(TIME_WEIGHT, layer_ms))
        mean.add(min(layer_ms, LAYER_OUTLIER * mean.value))

    def observe_growth(self, num_uncached_tokens: int, layers: Sequence[int], ms: float) -> float:
        """Learn from the drafting of a step: `layers` are the nodes expanded by each layer, `ms` is the time of all.

        Return the part that went into reading `num_uncached_tokens`: 0 if the drafter had not fallen behind.
        """
        known = [self.layer_ms(nodes) for nodes in layers]
        if num_uncached_tokens > MIN_CATCH_UP_TOKENS * max(layers[:1], default=1):
            catch_up_ms = max(ms - sum(known), 0.0)
            self._row_ms.add(catch_up_ms / num_uncached_tokens)
            return catch_up_ms
        if not all(known):  # not measured yet: a layer's time hardly depends on its nodes
            known = [1.0] * len(layers)
        for nodes, part in zip(layers, known, strict=True):
            self.observe(nodes, ms * part / sum(known))
        return 0.0

    def best_child_ratio(self, depth: int) -> float:
        """Return the value of a node's best child over the node's own, as expected; the root has depth 0."""
        return self._best_child[min(depth, DEPTH_CLASSES - 1)].value

    def observe_best_children(self, depth: int, best_children: float, parents: float) -> None:
        """Learn from the summed values of nodes at a depth and of the best child of each.

        Ratios of deeper nodes recover a little: a layer that once looked bad is otherwise never tried again.
        """
        index = min(depth, DEPTH_CLASSES - 1)
        self._best_child[index].add(best_children / parents)
        for deeper in self._best_child[index + 1 :]:
            deeper.value += BEST_CHILD_RECOVERY * (1.0 - deeper.value)

    def observe_gain(self, tokens: float) -> None:
        """Learn what one tree brought in one step over plain decoding, in tokens."""
        self._gain.add(tokens)

    def as_json(self) -> dict[str, Any]:
        """Return the times as measured by now."""
        return DraftTimes({2**size: mean.value for size, mean in self._layer_ms.items()}, self.row_ms).as_json()

    def record(self) -> dict[str, Any]:
        """Return what was learned as JSON, for `restore`: gain, ratios of best children, times as measured by now."""
        return {
            "gain": self._gain.record(),
            "best_child": [mean.record() for mean in self._best_child],
            "layer_ms": {str(size): mean.record() for size, mean in sorted(self._layer_ms.items())},
            "row_ms": self._row_ms.record(),
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Continue from what `record` returned."""
        self._gain.restore(record["gain"])
        self._row_ms.restore(record["row_ms"])
        for mean, stored in zip(self._best_child, record["best_child"], strict=True):
            mean.restore(stored)
        for size, stored in record["layer_ms"].items():
            self._layer_ms.setdefault(int(size), RunningMean(TIME_WEIGHT)).restore(stored)
