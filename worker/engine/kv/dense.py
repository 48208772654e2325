"""KV cache: one slot per sequence, keys and values of all layers.

Rows of a draft tree are written behind the committed prefix; after verification `compact` moves the accepted path
down and the rest is simply overwritten later. The
operating system commits the memory of a slot when it is first written.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.engine.segments import KvMove

POISON = (
    1e4  # what freed slots are filled with under test: finite, so that a masked read stays harmless and a leak shows
)


class DenseKv:
    """Keys and values [layers, slots, capacity, kv_heads, head_dim] of one model.

    The tokens of a slot lie one behind the other with all their heads, so a short text touches little memory.
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
    ) -> None:
        """Reserve room for `slots` sequences of `capacity` tokens, tree rows included."""
        shape = (layers, slots, capacity, kv_heads, head_dim)
        self.capacity = capacity
        self.keys = lazy_zeros(shape, dtype, device)
        self.values = lazy_zeros(shape, dtype, device)

    def write(self, layer: int, slot: Tensor, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store rows: `slot` and `index` int64 [n], `keys` and `values` [n, kv_heads, head_dim]."""
        self.keys[layer][slot, index] = keys
        self.values[layer][slot, index] = values

    def read(self, layer: int, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """Return views of the first `length` keys and values of some slots, [slots, kv_heads, length, head_dim]."""
        return self.keys[layer, slots, :length].transpose(1, 2), self.values[layer, slots, :length].transpose(1, 2)

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring accepted rows down behind the committed prefix, all layers at once."""
        moves = [m for m in moves if not m.in_place]
        if not moves:
            return
        device = self.keys.device
        slot = torch.from_numpy(np.repeat([m.slot for m in moves], [len(m.sources) for m in moves])).to(device)
        source = torch.from_numpy(np.concatenate([m.sources for m in moves])).to(device)
        places = np.concatenate([np.arange(m.destination, m.destination + len(m.sources)) for m in moves])
        place = torch.from_numpy(places).to(device)
        for store in (self.keys, self.values):
            # the right-hand side is gathered before anything is written: overlapping moves are safe
            store[:, slot, place] = store[:, slot, source]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for store in (self.keys, self.values):
            store[:, target, :length] = store[:, source, :length]

    def poison(self, slot: int, start: int = 0) -> None:
        """Overwrite a slot from `start` on with a value that shows in any output that reads it (tests only)."""
        self.keys[:, slot, start:] = POISON
        self.values[:, slot, start:] = POISON


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros whose CPU pages are only committed when written, which those of torch.zeros are not.

    In small pages: a text touches a little in every layer and head, and huge ones would zero, and keep, a whole slot.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
