"""Which sequences take part in the next step: admission to KV slots, prompt chunks, running sequences.

[scheduler] -> drafter -> draft_tree -> verifier. First come, first served; the caller decides who comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from worker.engine.draft_tree import Forest
from worker.engine.kv_cache import Slots
from worker.engine.options import EngineOptions
from worker.engine.rows import IntArray, Segment, chain
from worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a sequence's ids to bring into its KV slot."""

    sequence: Sequence
    end: int  # ids[cached:end]
    completes: bool  # the sequence's next token comes out of this chunk

    def segment(self) -> Segment:
        """Return the chunk's rows."""
        s = self.sequence
        return chain(s.slot, s.cached, s.ids[s.cached : self.end], keep_last=self.completes)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step works on."""

    chunks: tuple[Chunk, ...]
    decoding: tuple[Sequence, ...]

    @property
    def empty(self) -> bool:
        """True when there is nothing to run."""
        return not self.chunks and not self.decoding

    @property
    def emitting(self) -> tuple[Sequence, ...]:
        """Sequences that get tokens from this step: those decoding, then those whose prefill completes."""
        return self.decoding + tuple(c.sequence for c in self.chunks if c.completes)

    @property
    def prefill_rows(self) -> int:
        """Prompt tokens of the step."""
        return sum(c.end - c.sequence.cached for c in self.chunks)

    @property
    def entries(self) -> float:
        """KV entries that the decoding sequences' rows attend to, one row each."""
        return float(sum(len(s.ids) for s in self.decoding))

    def pack(self, forest: Forest) -> tuple[list[Segment], IntArray]:
        """Return the step's segments in slot order, and for each node of `forest` its row of the kept logits."""
        trees = {s.slot: (tree, forest.nodes_of(tree)) for tree, s in enumerate(forest.sequences)}
        chunks = {c.sequence.slot: c for c in self.chunks}
        rows = np.zeros(forest.size, np.int64)
        segments: list[Segment] = []
        kept = 0
        for slot in sorted({*trees, *chunks}):
            tree, nodes = trees.get(slot, (-1, np.empty(0, np.int64)))
            segment = chunks[slot].segment() if slot in chunks else forest.segment(tree, nodes)
            rows[nodes] = kept + np.arange(len(nodes))
            kept += len(segment.keep)
            segments.append(segment)
        return segments, rows


class Scheduler:
    """Waiting and running sequences, and the slots they hold."""

    def __init__(self, options: EngineOptions) -> None:
        """Start empty."""
        self._options = options
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.slots = Slots(options.max_sequences)

    @property
    def room(self) -> int:
        """Sequences that would be admitted at once."""
        return max(0, self.slots.free - len(self._waiting))

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Everyone here, running first."""
        return (*self._running, *self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def drop_finished(self) -> list[Sequence]:
        """Let finished and cancelled sequences go and free their slots; return those that held one."""
        self._waiting = deque(s for s in self._waiting if not s.finished)
        gone = [s for s in self._running if s.finished]
        self._running = [s for s in self._running if not s.finished]
        for sequence in gone:
            self.slots.give_back(sequence.slot)
        return gone

    def next_batch(self) -> Batch:
        """Admit who fits, give prompts their rows, and return the step's work."""
        while self._waiting and self.slots.free:
            sequence = self._waiting.popleft()
            sequence.slot = self.slots.take()
            self._running.append(sequence)
        return Batch(
            chunks=tuple(self._chunks(s for s in self._running if s.prefilling)),
            decoding=tuple(s for s in self._running if not s.prefilling),
        )

    def _chunks(self, prefilling: Iterable[Sequence]) -> Iterable[Chunk]:
        rows = self._options.prefill_rows
        for sequence in prefilling:
            if rows <= 0:
                return
            end = min(len(sequence.ids), sequence.cached + rows)
            rows -= end - sequence.cached
            yield Chunk(sequence, end, completes=end == len(sequence.ids))
