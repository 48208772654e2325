"""Hidden states of the target, one row per KV entry, for drafts that read them.

A row lives and moves as the keys and values of its entry do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.engine.kv.dense import lazy_zeros
from worker.engine.segments import KvMove, Segment

_FEW = 8  # segments that are copied one by one, which is cheaper than telling torch where every row goes


class HiddenStates:
    """Rows [slots, capacity, size]; `size` is the width of all tapped layers together."""

    def __init__(self, slots: int, capacity: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Reserve room for `slots` sequences of `capacity` entries."""
        self.capacity = capacity
        self._rows = lazy_zeros((slots, capacity, size), dtype, device)

    @property
    def address(self) -> int:
        """Where the first row lies: a whole network writes its rows itself."""
        return self._rows.data_ptr()

    def read(self, slot: int, start: int, end: int) -> Tensor:
        """Return the rows of entries start..end-1 of a slot, [end - start, size]; a view."""
        return self._rows[slot, start:end]

    def write(self, segments: Sequence[Segment], rows: Tensor) -> None:
        """Store the rows [n, size] of a forward over `segments`."""
        if len(segments) <= _FEW:
            row = 0
            for s in segments:
                self._rows[s.slot, s.start : s.end] = rows[row : row + len(s.ids)]
                row += len(s.ids)
            return
        slots = np.repeat([s.slot for s in segments], [len(s.ids) for s in segments])
        entries = np.concatenate([np.arange(s.start, s.end) for s in segments])
        self._rows[torch.from_numpy(slots), torch.from_numpy(entries)] = rows

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring accepted rows down behind the committed prefix."""
        for move in moves:
            if not move.in_place:
                rows = self._rows[move.slot]
                rows[move.destination : move.destination + len(move.sources)] = rows[torch.from_numpy(move.sources)]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` rows of one slot to another."""
        self._rows[target, :length] = self._rows[source, :length]
