"""The work of one step: prompt chunks and decoding sequences, packed as rows of one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from worker.engine.kv.slot_allocator import Truncation
from worker.engine.segments import IntArray, PrefixCopy, Segment, Segments, chain
from worker.engine.sequence import Sequence

if TYPE_CHECKING:
    from worker.engine.speculation.draft_tree import Forest


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a prompt to prefill in this step."""

    sequence: Sequence
    end: int  # the chunk is ids[cached:end]
    completes: bool  # the prefill ends with this chunk, so the sequence gets its next token from it

    def segment(self) -> Segment:
        """Return the chunk's rows."""
        s = self.sequence
        return chain(s.slot, s.cached, s.ids[s.cached : self.end], keep_last=self.completes)


@dataclass(frozen=True, slots=True)
class Batch:
    """The work of one step."""

    chunks: tuple[Chunk, ...]
    decoding: tuple[Sequence, ...]
    prefix_copies: tuple[PrefixCopy, ...] = ()  # to make before the forward, in this order
    truncations: tuple[Truncation, ...] = ()  # slots to truncate before that, to free memory
    preempted: tuple[Sequence, ...] = ()  # sequences that have lost their slots
    draft_rows: int = 1 << 30  # draft nodes that KV memory has pages for
    plain: bool = False  # don't draft

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
        """KV entries that the decoding sequences attend to without drafts: one row per sequence."""
        return float(sum(len(s.ids) for s in self.decoding))

    def pack(self, forest: Forest) -> tuple[Segments, IntArray]:
        """Return the step's segments in slot order, and the row in the kept logits of each node of `forest`.

        The first trees are those of the decoding sequences. Those of sequences whose prefill completes are roots alone.
        """
        trees, nodes = forest.segments(len(self.decoding))
        rows = np.zeros(forest.size, np.int64)
        rows[nodes] = np.arange(len(nodes))
        if not self.chunks:
            return trees, rows
        completed = np.arange(len(self.decoding), len(forest.sequences))  # roots, each with one kept row
        rows[completed] = np.arange(len(nodes), len(nodes) + len(completed))
        chunks = Segments.of([chunk.segment() for chunk in self.chunks])
        both = Segments.joined(trees, chunks)
        order = np.argsort(both.slots)
        kept = np.empty(len(both.kept), np.int64)
        kept[both.kept_in(order)] = np.arange(len(kept))
        return both.ordered(order), kept[rows]
