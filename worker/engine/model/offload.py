"""Models larger than the GPUs: accelerate puts layers on several devices, in main memory or on disk.

accelerate copies weights to a device when a layer runs, which is slow. Keys and values stay on the device that computes
their layer.
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

from worker.engine.attention_options import AttentionOptions
from worker.engine.kv.dense import DenseKv
from worker.engine.model.attention import DenseAttentionPlan
from worker.engine.segments import KvMove, Segment

_OFFLOADED = ("cpu", "disk")


@dataclass(frozen=True, slots=True)
class OffloadOptions:
    """Where accelerate may put the weights of a model."""

    folder: Path  # for weights that fit on no device and not in main memory
    memory: dict[str | int, int | str] | None = None  # limit per device, as accelerate's max_memory; None: what is free

    def options(self) -> dict[str, Any]:
        """Return the arguments for `from_pretrained`."""
        return {"device_map": "auto", "offload_folder": str(self.folder), "max_memory": self.memory}


def is_offloaded(model: PreTrainedModel) -> bool:
    """Return whether accelerate has placed a model's layers."""
    return getattr(model, "hf_device_map", None) is not None


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a model's token ids and logits."""
    if not is_offloaded(model):
        return model.device
    devices = [device for device in _map(model).values() if device not in _OFFLOADED]
    return torch.device(devices[0] if devices else "cpu")


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Return the device that computes each layer; `input_device` computes those whose weights are offloaded."""
    main = input_device(model)
    names = [f"{model.base_model_prefix}.layers.{n}" for n in range(model.config.get_text_config().num_hidden_layers)]
    devices = [_device_of(model, name) for name in names]
    return [main if device in _OFFLOADED else torch.device(device) for device in devices]


class MultiDeviceKv:
    """A `KvStore` with a `DenseKv` on every device, for the layers that it computes."""

    def __init__(
        self,
        devices: Sequence[torch.device],
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        """Allocate KV on every device for the layers that it computes."""
        self.capacity = capacity
        self.parts = {
            device: DenseKv(layers, slots, kv_heads, capacity, head_dim, dtype, device)
            for device, layers in Counter(devices).items()
        }
        seen: Counter[torch.device] = Counter()
        self.layers: list[tuple[torch.device, int]] = []  # of each layer: its device, and its index there
        for device in devices:
            self.layers.append((device, seen[device]))
            seen[device] += 1

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move accepted entries down to the end of the committed prefix."""
        for part in self.parts.values():
            part.compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for part in self.parts.values():
            part.copy_prefix(source, target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Do nothing: slots are dense."""

    def poison(self, slot: int, start: int = 0) -> None:
        """Overwrite a slot from `start` on with a value that shows in any output that reads it (tests only)."""
        for part in self.parts.values():
            part.poison(slot, start)


@dataclass(slots=True)
class MultiDeviceAttentionPlan:
    """An `AttentionPlan` with a `DenseAttentionPlan` on every device."""

    segments: Sequence[Segment]
    kv: MultiDeviceKv
    query_groups: int
    tapped: Tensor | None = None
    _plans: dict[torch.device, DenseAttentionPlan] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Attend on the layer's device; see `AttentionPlan`."""
        device, index = self.kv.layers[layer]
        if device not in self._plans:
            self._plans[device] = DenseAttentionPlan(self.segments, self.kv.parts[device], self.query_groups)
        return self._plans[device].attend(index, query, key, value, options)


def _device_of(model: PreTrainedModel, name: str) -> Any:
    """Return the device of a module's weights: the device map names the module, or one that contains it."""
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next(device for prefix in prefixes if (device := _map(model).get(prefix)) is not None)


def _map(model: PreTrainedModel) -> dict[str, Any]:
    return dict(model.hf_device_map)  # type: ignore[arg-type]  # set on the instance by accelerate
