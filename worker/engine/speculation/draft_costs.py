"""Costs of drafting (ms per layer and per token read) and its gain in tokens: calibrated, then learned from steps.

The first layer of a step has a time of its own: a drafter may run its only forward there, and look further layers up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from worker.engine.host.nodes import FloatArray
from worker.engine.speculation.constants import (
    BEST_CHILD_RECOVERY,
    BEST_CHILD_WEIGHT,
    DEPTH_CLASSES,
    LAYER_OUTLIER,
    MIN_CATCH_UP_TOKENS,
    TIME_WEIGHT,
)
from worker.engine.speculation.cost_model import LOAD_CLASSES, load_class
from worker.engine.speculation.running_mean import RunningMean


@dataclass(frozen=True, slots=True)
class DraftTimes:
    """Times of a drafter's forwards on this machine, as calibrated."""

    first_ms: Mapping[int, float]  # time of the first layer by the number of trees
    layer_ms: Mapping[int, float]  # time of a further layer by the number of nodes that it expands
    row_ms: float  # time per committed token when many are read together

    def as_json(self) -> dict[str, Any]:
        """Return the times for the calibration file."""
        first, further = (
            {str(nodes): round(ms, 4) for nodes, ms in sorted(times.items())}
            for times in (self.first_ms, self.layer_ms)
        )
        return {"first_ms_by_trees": first, "layer_ms_by_nodes": further, "row_ms": round(self.row_ms, 5)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the times that `as_json` wrote."""
        first, further = (
            {int(nodes): float(ms) for nodes, ms in stored[name].items()}
            for name in ("first_ms_by_trees", "layer_ms_by_nodes")
        )
        return cls(first, further, float(stored["row_ms"]))


class _LayerTimes:
    """The time of a layer by the load class of the nodes that it expands."""

    def __init__(self, calibrated: Mapping[int, float]) -> None:
        settled = partial(RunningMean.settled, TIME_WEIGHT)
        self._means = {load_class(nodes): settled(ms) for nodes, ms in calibrated.items()}
        # ms by load class, as `of` knows them, for compiled growth
        self.known: FloatArray = np.full(LOAD_CLASSES, np.nan)
        self._publish()

    def of(self, nodes: int) -> float:
        """Return the time of a layer in ms; for a size never seen, that of the nearest smaller one, 0 if none is."""
        for size in range(load_class(nodes), -1, -1):
            if size in self._means:
                return self._means[size].value
        return 0.0

    def observe(self, nodes: int, layer_ms: float) -> None:
        size = load_class(nodes)
        mean = self._means.get(size)
        if mean is None:
            mean = self._means[size] = RunningMean.settled(TIME_WEIGHT, layer_ms)
        mean.add(min(layer_ms, LAYER_OUTLIER * mean.value))
        self.known[size] = mean.value

    def now(self) -> dict[int, float]:
        return {2**size: mean.value for size, mean in self._means.items()}

    def record(self) -> dict[str, Any]:
        return {str(size): mean.record() for size, mean in sorted(self._means.items())}

    def restore(self, record: Mapping[str, Any]) -> None:
        for size, stored in record.items():
            self._means.setdefault(int(size), RunningMean(TIME_WEIGHT)).restore(stored)
        self._publish()

    def _publish(self) -> None:
        for size, mean in self._means.items():
            self.known[size] = mean.value


class DraftCosts:
    """Costs and gains of one drafting strategy, measured while decoding."""

    def __init__(self, times: DraftTimes | None = None) -> None:
        """Start from calibrated times; without them a layer counts as free until one was drafted."""
        self._first, self._further = (
            _LayerTimes(times.first_ms if times else {}),
            _LayerTimes(times.layer_ms if times else {}),
        )
        row_ms = times.row_ms if times else 0.0  # 0 is no time: the first one that is measured counts in full
        self._row_ms = RunningMean.settled(TIME_WEIGHT, row_ms) if row_ms else RunningMean(TIME_WEIGHT)
        self._gain = RunningMean.settled(TIME_WEIGHT, 0.0)
        # Best child's value over its parent's, by depth of the parent. It starts optimistic, so that layers are tried.
        self.best_child: FloatArray = np.tile([1.0, 1.0 / BEST_CHILD_WEIGHT], (DEPTH_CLASSES, 1))  # value, samples

    @property
    def row_ms(self) -> float:
        """Time to read one committed token while catching up; 0 if it was never measured."""
        return self._row_ms.value

    @property
    def gain(self) -> float:
        """Tokens that one tree brings per step over plain decoding, with the step's own extra time deducted."""
        return self._gain.value

    def first_ms(self, trees: int) -> float:
        """Return the time of the first layer of a step with this many trees; see `layer_ms`."""
        return self._first.of(trees)

    @property
    def known_layer_ms(self) -> FloatArray:
        """Times of further layers by load class; NaN: never seen."""
        return self._further.known

    def layer_ms(self, nodes: int) -> float:
        """Return the time of a further layer; for a size never seen, that of the nearest smaller one."""
        return self._further.of(nodes)

    def observe_growth(self, num_uncached_tokens: int, layers: Sequence[int], ms: float) -> float:
        """Learn from the drafting of a step: `layers` are the nodes expanded by each layer, `ms` is the time of all.

        Return the part that went into reading `num_uncached_tokens`: 0 if the drafter had not fallen behind.
        """
        times = [self._further if layer else self._first for layer in range(len(layers))]
        known = [time.of(nodes) for time, nodes in zip(times, layers, strict=True)]
        if num_uncached_tokens > MIN_CATCH_UP_TOKENS * max(layers[:1], default=1):
            catch_up_ms = max(ms - sum(known), 0.0)
            self._row_ms.add(catch_up_ms / num_uncached_tokens)
            return catch_up_ms
        if not all(known):  # not measured yet: a layer's time hardly depends on its nodes
            known = [1.0] * len(layers)
        together = sum(known)
        for time, nodes, part in zip(times, layers, known, strict=True):
            time.observe(nodes, ms * part / together)
        return 0.0

    def best_child_ratio(self, depth: int) -> float:
        """Return the value of a node's best child over the node's own, as expected; the root has depth 0."""
        return float(self.best_child[min(depth, DEPTH_CLASSES - 1), 0])

    def observe_best_children(self, depth: int, best_children: float, parents: float) -> None:
        """Learn from the summed values of nodes at a depth and of the best child of each.

        Ratios of deeper nodes recover a little: a layer that once looked bad is otherwise never tried again.
        """
        index = min(depth, DEPTH_CLASSES - 1)
        mean, deeper = self.best_child[index], self.best_child[index + 1 :, 0]
        mean[1] += 1.0
        mean[0] += max(BEST_CHILD_WEIGHT, 1.0 / mean[1]) * (best_children / parents - mean[0])
        deeper += BEST_CHILD_RECOVERY * (1.0 - deeper)

    def observe_gain(self, tokens: float) -> None:
        """Learn what one tree brought in one step over plain decoding, in tokens."""
        self._gain.add(tokens)

    def as_json(self) -> dict[str, Any]:
        """Return the times as measured by now."""
        return DraftTimes(self._first.now(), self._further.now(), self.row_ms).as_json()

    def record(self) -> dict[str, Any]:
        """Return what was learned as JSON, for `restore`: gain, ratios of best children, times as measured by now."""
        return {
            "gain": self._gain.record(),
            "best_child": [[round(value, 6), int(samples)] for value, samples in self.best_child.tolist()],
            "first_ms": self._first.record(),
            "layer_ms": self._further.record(),
            "row_ms": self._row_ms.record(),
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Continue from what `record` returned."""
        self._gain.restore(record["gain"])
        self._row_ms.restore(record["row_ms"])
        best_child = np.array(record["best_child"], np.float64)
        if best_child.shape != self.best_child.shape:
            raise ValueError("the stored ratios of best children don't fit")
        self.best_child[:] = best_child
        self._first.restore(record["first_ms"])
        self._further.restore(record["layer_ms"])
