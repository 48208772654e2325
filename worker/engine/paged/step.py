"""One step over paged KV as flat numbers: what the first rank of a split model lays out, and the others receive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from worker.engine.paged.rows import Shape
from worker.engine.segments import IntArray

COLUMNS = 5  # arrays of a step


@dataclass(frozen=True, slots=True, eq=False)
class PagedStep:
    """The rows of a forward, and what happened to KV memory since the step before it."""

    shape: Shape
    in_bucket: bool  # the shape is that of a bucket: captured when it first comes, and replayed
    flat: IntArray  # see `PagedRows`
    blocks: IntArray  # [3, n] that slots took: slot, index in its block table, block
    moves: Sequence[IntArray]  # each [2, entries]: where entries of the pool come from and go to

    def columns(self) -> tuple[IntArray, ...]:
        """Return the step as `COLUMNS` arrays of one dimension."""
        *sizes, row_bounds = astuple(self.shape)
        counts = np.array([moved.shape[1] for moved in self.moves], np.int64)
        moved = [moved.ravel() for moved in self.moves]
        return (
            np.array([self.in_bucket, *sizes, *row_bounds], np.int64),
            self.flat,
            self.blocks.ravel(),
            counts,
            np.concatenate([np.empty(0, np.int64), *moved]),
        )

    @classmethod
    def of(cls, columns: Sequence[IntArray]) -> PagedStep:
        """Return the step with these `columns`."""
        numbers, flat, blocks, counts, moved = columns
        in_bucket, rows, kept, sequences, queries, width, listed, causal, parts, items, *row_bounds = numbers.tolist()
        sizes = (rows, kept, sequences, queries, width, listed, bool(causal), parts, items)
        moves = np.split(moved, np.cumsum(2 * counts)[:-1]) if len(counts) else []
        return cls(
            shape=Shape(*sizes, row_bounds=tuple(row_bounds)),
            in_bucket=bool(in_bucket),
            flat=flat,
            blocks=blocks.reshape(3, -1),
            moves=[some.reshape(2, -1) for some in moves],
        )
