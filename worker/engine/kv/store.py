"""The interface that KV stores of all memory layouts have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from worker.engine.segments import KvMove


class KvStore(Protocol):
    """Keys and values of one model: a slot of `capacity` entries for each sequence."""

    capacity: int  # KV entries of a slot, tree rows included

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move accepted entries of all layers down to the end of the committed prefix."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of slot `source` to slot `target`; paged KV shares full blocks instead."""

    def truncate(self, slot: int, length: int) -> None:
        """Free the memory of a slot beyond its first `length` entries; dense layouts on a GPU zero an emptied slot."""

    def poison(self, slot: int) -> None:
        """Overwrite a slot with a value that shows in any output that reads it (tests only)."""
