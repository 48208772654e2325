"""Interleave the steps of several engines on one target, so that all see the same machine load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

from torch import Tensor

from worker.engine.engine import Engine
from worker.engine.model.packed_model import ChoosesFactors, LanguageModel
from worker.engine.segments import KvMove, KvMoves, Segment, Segments
from worker.engine.stats import StepBatch


class SlotRange:
    """A range of a target's KV slots, used as a separate target."""

    def __init__(self, target: LanguageModel, first: int, slots: int) -> None:
        """Use the slots from `first` to `first + slots - 1` of the target."""
        self._target, self._first, self._slots = target, first, slots

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run segments whose slots are relative to this range."""
        packed = Segments.of(segments)
        return self._target.forward(replace(packed, slots=packed.slots + self._first))

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move the KV rows of accepted paths to the end of their prefixes."""
        packed = KvMoves.of(moves)
        self._target.compact(replace(packed, slots=packed.slots + self._first))

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the prefix of one of these slots to another."""
        self._target.copy_prefix(self._first + source, self._first + target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Drop the KV rows of a slot after `length`."""
        self._target.truncate(self._first + slot, length)

    def clear(self) -> None:
        """Drop the KV rows of all slots of this range."""
        for slot in range(self._slots):
            self.truncate(slot, 0)
            self.mark_long(slot, long=False)

    def mark_long(self, slot: int, long: bool) -> None:
        """Let the rows of a slot have the long factors of longrope from now on, or the short ones."""
        if isinstance(self._target, ChoosesFactors):
            self._target.mark_long(self._first + slot, long)


def run_interleaved(
    engines: Sequence[Engine],
    clock: Callable[[], float] | None = None,
    until: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, StepBatch], object] = lambda *_: None,
) -> list[float]:
    """Step the engines until all are idle or `until` holds; return the seconds that each spent in steps.

    The engine with the least time so far is next. `clock` returns seconds (default: wall time); `on_step` takes the
    index of an engine and the results of its step, and is not timed.
    """
    now, seconds = clock or perf_counter, [0.0] * len(engines)
    while (running := [index for index, engine in enumerate(engines) if engine.busy]) and not until():
        index = min(running, key=seconds.__getitem__)
        started = now()
        results = engines[index].step()
        seconds[index] += now() - started
        on_step(index, results)
    return seconds
