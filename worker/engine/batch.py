"""The work of one step: prompt chunks and decoding sequences, packed as rows of one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from worker.engine.segments import IntArray, PrefixCopy, Segment, chain
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
    evicted: tuple[int, ...] = ()  # slots whose cached prefixes are dropped before that, to free their memory
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

    def pack(self, forest: Forest) -> tuple[list[Segment], IntArray]:
        """Return the step's segments in slot order, and the row in the kept logits of each node of `forest`."""
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
