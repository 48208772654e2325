"""Dense KV: one slot of full capacity per sequence, for all layers.

Rows of a draft tree are written behind the committed prefix. After verification `compact` moves the accepted path down;
later rows overwrite the rest. The operating system commits the memory of a slot when it is first written.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from worker.engine.kv import fp8
from worker.engine.segments import KvMove, KvMoves

Select = Callable[[Tensor], Tensor]  # a view of a part of a store

# Linux reserves no swap for it: all slots in full would often be more than the machine has.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which Python's mmap does not name

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # only there, pages given back read as zeros

# Tests fill freed slots with it. NaN, as memory that was never written may be: even 0 times POISON shows.
POISON = math.nan


class DenseKv:
    """Keys and values [layers, slots, capacity, kv_heads, head_dim] of one model.

    A token's heads are contiguous, so that a short sequence touches little memory.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        in_fp8: bool = False,
        latent_dim: int = 0,
    ) -> None:
        """Allocate `slots` slots of `capacity` entries, tree rows included; a forward's rows have `dtype`.

        With `latent_dim`, an entry's values are the first numbers of its keys, which are stored once.
        """
        self.capacity = capacity
        shape = (layers, slots, capacity, kv_heads, head_dim)
        self._pair = KvPair(shape, dtype, device, in_fp8=in_fp8, in_one=latent_dim > 0)
        self.keys, self.values = self._pair.keys, self._pair.values

    def write(self, layer: int, slot: Tensor, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store rows: `slot` and `index` int64 [n], `keys` and `values` [n, kv_heads, head_dim]."""
        self._pair.write(keys, values, lambda store: store[layer], (slot, index))

    def read(self, layer: int, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values of some slots, [slots, kv_heads, length, head_dim]."""
        keys, values = self._pair.read(lambda store: store[layer, slots, :length])
        return keys.transpose(1, 2), values.transpose(1, 2)

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move accepted entries of all layers down to the end of the committed prefix."""
        some = KvMoves.of(moves)
        if not len(some):
            return
        slot, source, target = (
            torch.from_numpy(part).to(self.keys.device) for part in (some.entry_slots, some.sources, some.targets)
        )
        for store in self._pair.stores:
            # The right-hand side is gathered before anything is written: overlapping moves are safe.
            store[:, slot, target] = store[:, slot, source]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for store in self._pair.stores:
            store[:, target, :length] = store[:, source, :length]

    def truncate(self, slot: int, length: int) -> None:
        """Give the memory of a slot beyond its first `length` entries back to the operating system."""
        for store in self._pair.stores:
            release_memory(store, slot, length * store.stride(2))

    def poison(self, slot: int, start: int = 0) -> None:
        """Overwrite a slot from `start` on with a value that shows in any output that reads it (tests only)."""
        self._pair.poison((slice(None), slot, slice(start, None)))


class KvPair:
    """Keys and values of one shape [..., kv_heads, head_dim] in `dtype`, or in FP8 with exponents [..., kv_heads].

    Methods take functions that select a part of a store, which is the same part of all of them. If the pair is
    `in_one`, its values are its keys.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, in_fp8: bool, in_one: bool = False
    ) -> None:
        """Allocate zeros."""
        self.dtype = dtype  # of the rows of a forward
        stored, count = torch.uint8 if in_fp8 else dtype, 1 if in_one else 2
        numbers = tuple(lazy_zeros(shape, stored, device) for _ in range(count))
        self.keys, self.values = numbers[0], numbers[-1]
        self.exponents = tuple(lazy_zeros(shape[:-1], stored, device) for _ in range(count)) if in_fp8 else ()
        self.stores = (*numbers, *self.exponents)

    def write(self, keys: Tensor, values: Tensor, of: Select, index: Any) -> None:
        """Store `keys` and `values` [n, kv_heads, head_dim] at an index of the selected parts."""
        rows: tuple[Tensor, ...] = (keys,) if self.keys is self.values else (keys, values)
        if self.exponents:
            numbers, exponents = zip(*map(fp8.encoded, rows), strict=True)
            rows = (*numbers, *exponents)
        for store, given in zip(self.stores, rows, strict=True):
            of(store)[index] = given

    def read(self, of: Select) -> tuple[Tensor, Tensor]:
        """Return the selected keys and values [..., kv_heads, head_dim] in `dtype`."""
        if not self.exponents:
            return of(self.keys), of(self.values)
        found = [of(store) for store in self.stores]
        half = len(found) // 2
        read = [fp8.decoded(*pair, self.dtype) for pair in zip(found[:half], found[half:], strict=True)]
        return read[0], read[-1]

    def poison(self, index: Any) -> None:
        """Overwrite a part with a value that shows in any output that reads it (tests only)."""
        for store in self.stores:
            store[index] = fp8.POISON if self.exponents else POISON


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros whose CPU memory is committed page by page when written, unlike that of torch.zeros.

    Pages are small: a sequence touches a little of every layer and head, and huge pages would commit the whole slot.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def release_memory(store: Tensor, slot: int, kept: int, parts: int = 1) -> None:
    """Give memory of lazy zeros [layers, slots, …] back to the operating system until it is written again.

    A slot is contiguous, in `parts` parts of one size; of each part the first `kept` numbers stay. Memory that can't be
    given back is overwritten if the slot is emptied: what a text left there may be NaN, and weight 0 times NaN is NaN.
    """
    if _LIBC is None or store.device.type != "cpu":
        if not kept:
            store[:, slot] = 0.0
        return
    layer_bytes, slot_bytes = (store.stride(axis) * store.element_size() for axis in (0, 1))
    part_bytes, kept_bytes, page = slot_bytes // parts, kept * store.element_size(), mmap.PAGESIZE
    for layer in range(len(store)):
        slot_start = store.data_ptr() + layer * layer_bytes + slot * slot_bytes
        for start in range(slot_start, slot_start + slot_bytes, part_bytes):
            first, end = -(-(start + kept_bytes) // page) * page, (start + part_bytes) // page * page
            if first < end:
                _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
