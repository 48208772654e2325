"""Interleave the steps of several engines on one target, so that all see the same machine load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

from torch import Tensor

from worker.engine.engine import Engine
from worker.engine.model.packed_model import LanguageModel
from worker.engine.segments import KvMove, Segment


class SlotRange:
    """A stretch of a target's slots, as a target by itself."""

    def __init__(self, target: LanguageModel, first: int, slots: int) -> None:
        """Take the slots first..first+slots-1."""
        self._target, self._first, self._slots = target, first, slots

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run the rows of segments in these slots."""
        return self._target.forward([replace(s, slot=self._first + s.slot) for s in segments])

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring the rows of accepted paths down."""
        self._target.compact([replace(move, slot=self._first + move.slot) for move in moves])

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the beginning of one of these slots to another."""
        self._target.copy_prefix(self._first + source, self._first + target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Nobody will ask for more than the beginning of a slot."""
        self._target.truncate(self._first + slot, length)

    def clear(self) -> None:
        """Nobody will ask for anything that these slots hold."""
        for slot in range(self._slots):
            self.truncate(slot, 0)


def run_interleaved(engines: Sequence[Engine]) -> list[float]:
    """Run engines until none is busy; return the seconds that the steps of each took.

    The next step is of the one that has had the least time.
    """
    seconds = [0.0] * len(engines)
    while running := [place for place, engine in enumerate(engines) if engine.busy]:
        place = min(running, key=seconds.__getitem__)
        started = perf_counter()
        engines[place].step()
        seconds[place] += perf_counter() - started
    return seconds
