"""Models that are larger than the GPUs: layers on several devices, some of them in main memory or on disk.

accelerate lays the layers out and brings to a device what it needs when it is needed: slow, but it works. Keys and
values stay where their layer is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.kv.dense import DenseKv
from worker.engine.model.attention import DenseAttentionPlan
from worker.engine.segments import KvMove, Segment

_OFFLOADED = ("cpu", "disk")


@dataclass(frozen=True, slots=True)
class OffloadOptions:
    """How a model is to be laid out."""

    folder: Path  # of weights that fit nowhere else
    memory: dict[str | int, int | str] | None = None  # most of each device, as accelerate takes it; none: what is free

    def options(self) -> dict[str, Any]:
        """Return what `from_pretrained` takes."""
        return {"device_map": "auto", "offload_folder": str(self.folder), "max_memory": self.memory}


def is_offloaded(model: PreTrainedModel) -> bool:
    """Return whether accelerate has laid a model out."""
    return getattr(model, "hf_device_map", None) is not None


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that takes a model's token ids and gives its logits."""
    if not is_offloaded(model):
        return model.device
    places = [place for place in _map(model).values() if place not in _OFFLOADED]
    return torch.device(places[0] if places else "cpu")


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Return where each layer is computed; one that is kept off the GPUs is computed at home."""
    home = input_device(model)
    names = [f"{model.base_model_prefix}.layers.{n}" for n in range(model.config.get_text_config().num_hidden_layers)]
    places = [_place(model, name) for name in names]
    return [home if place in _OFFLOADED else torch.device(place) for place in places]


class MultiDeviceKv:
    """KV slots whose layers lie on several devices; the interface of `DenseKv`."""

    def __init__(
        self,
        devices: Sequence[torch.device],
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        """Reserve room on every device for the layers that are computed there."""
        self.capacity = capacity
        self.parts = {
            device: DenseKv(layers, slots, kv_heads, capacity, head_dim, dtype, device)
            for device, layers in Counter(devices).items()
        }
        seen: Counter[torch.device] = Counter()
        self.places: list[tuple[torch.device, int]] = []  # of each layer: its device, and its number there
        for device in devices:
            self.places.append((device, seen[device]))
            seen[device] += 1

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring accepted rows down behind the committed prefix."""
        for part in self.parts.values():
            part.compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for part in self.parts.values():
            part.copy_prefix(source, target, length)

    def poison(self, slot: int, start: int = 0) -> None:
        """Overwrite a slot from `start` on with a value that shows in any output that reads it (tests only)."""
        for part in self.parts.values():
            part.poison(slot, start)


@dataclass(slots=True)
class MultiDeviceAttentionPlan:
    """Where the rows of one forward go and what they see, on every device; the interface of `DenseAttentionPlan`."""

    segments: Sequence[Segment]
    kv: MultiDeviceKv
    query_groups: int
    tapped: Tensor | None = None
    _plans: dict[torch.device, DenseAttentionPlan] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Attend on the device of the layer."""
        device, number = self.kv.places[layer]
        if device not in self._plans:
            self._plans[device] = DenseAttentionPlan(self.segments, self.kv.parts[device], self.query_groups)
        return self._plans[device].attend(number, query, key, value, scaling, window)


def _place(model: PreTrainedModel, name: str) -> Any:
    """Return where a module is kept: the map names it, or one of those it is part of."""
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next(place for prefix in prefixes if (place := _map(model).get(prefix)) is not None)


def _map(model: PreTrainedModel) -> dict[str, Any]:
    return dict(model.hf_device_map)  # type: ignore[arg-type]  # set on the instance by accelerate
