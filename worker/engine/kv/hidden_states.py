"""Hidden states of the target, one row per KV entry, for draft heads that read them.

Rows are stored, moved and copied together with the keys and values of their entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.kv.dense import lazy_zeros, release_memory
from worker.engine.segments import KvMove, Segment, Segments

_FEW_SEGMENTS = 8  # up to this many are copied one by one: cheaper than building index tensors


class HiddenStates:
    """Rows [slots, capacity, size]; `size` is the total width of the tapped layers."""

    def __init__(self, slots: int, capacity: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate `slots` slots of `capacity` rows."""
        self.capacity = capacity
        self._rows = lazy_zeros((slots, capacity, size), dtype, device)

    @property
    def address(self) -> int:
        """Address of the first row: the fused model on the CPU writes rows itself."""
        return self._rows.data_ptr()

    def read(self, slot: int, start: int, end: int) -> Tensor:
        """Return the rows of entries start..end-1 of a slot, [end - start, size]; a view."""
        return self._rows[slot, start:end]

    def write(self, segments: Sequence[Segment], rows: Tensor) -> None:
        """Store the rows [n, size] of a forward over `segments`."""
        packed = Segments.of(segments)
        if len(packed) <= _FEW_SEGMENTS:
            spans = (packed.slots, packed.starts, packed.ends, packed.firsts, packed.counts)
            for slot, start, end, first, count in zip(*(column.tolist() for column in spans), strict=True):
                self._rows[slot, start:end] = rows[first : first + count]
            return
        slots = packed.per_row(packed.slots)
        self._rows[torch.from_numpy(slots), torch.from_numpy(packed.entries)] = rows

    def truncate(self, slot: int, length: int) -> None:
        """Give the memory of a slot beyond its first `length` rows back to the operating system."""
        release_memory(self._rows.unsqueeze(0), slot, length * self._rows.stride(1))

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move accepted rows down to the end of the committed prefix."""
        for move in moves:
            if not move.in_place:
                rows = self._rows[move.slot]
                rows[move.destination : move.destination + len(move.sources)] = rows[torch.from_numpy(move.sources)]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` rows of one slot to another."""
        self._rows[target, :length] = self._rows[source, :length]
