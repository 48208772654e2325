"""The work of one step: prompt chunks and decoding sequences, packed as rows of one forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from worker.engine.kv.slot_allocator import Truncation
from worker.engine.segments import IntArray, PrefixCopy, Segment, Segments, chain, ranges
from worker.engine.sequence import Sequence

if TYPE_CHECKING:
    from worker.engine.speculation.draft_tree import Forest


class Chunk(NamedTuple):
    """A part of a prompt to prefill in this step."""

    sequence: Sequence
    end: int  # the chunk is ids[cached:end]
    completes: bool  # the prefill ends with this chunk, so the sequence gets its next token from it

    @property
    def scored(self) -> range:
        """Positions whose logits are kept for log-probabilities of the prompt."""
        return self.sequence.scored(self.sequence.cached, self.end)

    def segment(self) -> Segment:
        """Return the chunk's rows."""
        s, scored = self.sequence, self.scored
        rows = chain(s.slot, s.cached, s.packed_ids(self.end)[s.cached : self.end], keep_last=self.completes)
        if not scored:
            return rows
        return replace(rows, keep=np.append(np.arange(scored.start, scored.stop) - s.cached, rows.keep))


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

    def pack(self, forest: Forest) -> tuple[Segments, IntArray, IntArray]:
        """Return the step's segments in slot order, and the rows in the kept logits of nodes and of prompt tokens.

        The former are those of the nodes of `forest`: the first trees belong to the decoding sequences, and those of
        sequences whose prefill completes are roots alone. The latter are those of the chunks' scored positions.
        """
        trees, rows = forest.segments(len(self.decoding))
        if not self.chunks:
            return trees, rows, rows[:0]
        scored = np.array([len(chunk.scored) for chunk in self.chunks], np.int64)
        completes = np.array([chunk.completes for chunk in self.chunks], np.bool_)
        kept_before = trees.num_rows + (scored + completes).cumsum() - (scored + completes)
        completed = np.arange(len(self.decoding), len(forest.sequences))  # roots; each is the last row of its chunk
        rows[completed] = (kept_before + scored)[completes]
        chunks = Segments.of([chunk.segment() for chunk in self.chunks])
        both = Segments.joined(trees, chunks)
        order = np.argsort(both.slots)
        kept = np.empty(len(both.kept), np.int64)
        kept[both.kept_in(order)] = np.arange(len(kept))
        return both.ordered(order), kept[rows], kept[ranges(kept_before, scored)]
