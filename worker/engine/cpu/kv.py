"""KV slots in the layout of the compiled kernels: per slot and KV head, keys and values are two packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch

from worker.engine.cpu.kernels import Kernels, Plan
from worker.engine.kv import fp8
from worker.engine.kv.dense import POISON, lazy_zeros, release_memory
from worker.engine.segments import KvMove


class CpuKv:
    """A `KvStore` on the CPU: keys and values [layers, slots, kv_heads, capacity * head_dim].

    In FP8 an entry has a byte more: the exponents of a panel of entries lie behind their numbers. With `latent_dim`,
    the values of an entry are its first `latent_dim` keys: `values` is `keys`.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        kernels: Kernels,
        *,
        in_fp8: bool = False,
        latent_dim: int = 0,
    ) -> None:
        """Allocate `slots` slots of at least `capacity` entries (rounded up to panels), tree rows included."""
        self.capacity = -(-capacity // kernels.panel) * kernels.panel
        self.kv_heads, self.head_dim, self.fp8, self.latent_dim = kv_heads, head_dim, in_fp8, latent_dim
        self._entry = head_dim + 1 if in_fp8 else head_dim  # numbers of an entry in each head
        shape, dtype = (layers, slots, kv_heads, self.capacity * self._entry), torch.uint8 if in_fp8 else dtype
        self.keys = lazy_zeros(shape, dtype, torch.device("cpu"))
        self.values = self.keys if latent_dim else lazy_zeros(shape, dtype, torch.device("cpu"))
        self.stores = (self.keys,) if latent_dim else (self.keys, self.values)
        self._kernels = kernels
        self._plan = Plan(kv_heads=kv_heads, dim=head_dim, capacity=self.capacity, fp8=in_fp8, latent=latent_dim)

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move accepted entries of all layers down to the end of the committed prefix."""
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

        Copy whole panels, which are contiguous. Entries beyond `length` are overwritten before a row sees them.
        """
        panel = self._kernels.panel
        size = -(-length // panel) * panel * self._entry
        for store in self.stores:
            store[:, target, :, :size] = store[:, source, :, :size]

    def truncate(self, slot: int, length: int) -> None:
        """Give the memory of a slot back to the operating system, but for the panels of its first `length` entries."""
        panel = self._kernels.panel
        for store in self.stores:
            release_memory(store, slot, -(-length // panel) * panel * self._entry, parts=self.kv_heads)

    def poison(self, slot: int) -> None:
        """Overwrite a slot with a value that shows in any output that reads it (tests only)."""
        for store in self.stores:
            store[:, slot] = fp8.POISON if self.fp8 else POISON
