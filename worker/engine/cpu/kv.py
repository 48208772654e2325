"""KV slots in the layout of the compiled kernels: keys packed as a weight, values as another, per slot and KV head."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch

from worker.engine.cpu.kernels import Kernels, Plan
from worker.engine.kv.dense import POISON, lazy_zeros
from worker.engine.segments import KvMove


class CpuKv:
    """Keys and values [layers, slots, kv_heads, capacity * head_dim] of one model on the CPU."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, kernels: Kernels
    ) -> None:
        """Reserve room for `slots` sequences of at least `capacity` tokens, tree rows included."""
        self.capacity = -(-capacity // kernels.panel) * kernels.panel
        self.kv_heads, self.head_dim = kv_heads, head_dim
        shape = (layers, slots, kv_heads, self.capacity * head_dim)
        self.keys = lazy_zeros(shape, dtype, torch.device("cpu"))
        self.values = lazy_zeros(shape, dtype, torch.device("cpu"))
        self._kernels = kernels
        self._plan = Plan(kv_heads=kv_heads, dim=head_dim, capacity=self.capacity)

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring accepted rows down behind the committed prefix, all layers at once."""
        for move in moves:
            if move.in_place:
                continue
            self._kernels.move_entries(
                self.keys.data_ptr(),
                self.values.data_ptr(),
                byref(self._plan),
                self.keys.shape[0],
                self.keys.stride(0),
                move.slot,
                move.destination,
                move.sources.ctypes.data,
                len(move.sources),
            )

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another.

        Whole panels are copied, for they lie in one piece; what comes along beyond `length` is overwritten before any
        row sees it.
        """
        panel = self._kernels.panel
        size = -(-length // panel) * panel * self.head_dim
        for store in (self.keys, self.values):
            store[:, target, :, :size] = store[:, source, :, :size]

    def poison(self, slot: int) -> None:
        """Overwrite a slot with a value that shows in any output that reads it (tests only)."""
        self.keys[:, slot] = POISON
        self.values[:, slot] = POISON
