"""The rows of one forward as tensors of a fixed shape: token ids, KV entries to write, what each row sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from worker.engine.paged.kv import SCRATCH, PagedKv
from worker.engine.paged.work import BOUNDS, deal, max_parts
from worker.engine.segments import BoolArray, IntArray, Segment, kept_row_indices

TILE_QUERIES = 32  # query heads of a tile
MAX_PART_BYTES = 128 << 20  # memory of the partial results of a slice: enough for 256 rows of most models
LISTED = 16  # entries behind the shared prefix that a row can list in a bucket: its ancestors and itself


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a forward.

    A row sees a stretch, the first `seen` entries of its slot, and then the entries that it lists. Rows of chains list
    none: their stretch ends at the row itself. For rows of a tree, the stretch is the committed prefix.
    """

    rows: int
    kept: int  # rows whose logits are returned
    sequences: int  # runs: consecutive rows with a common stretch
    queries: int  # rows of the longest run
    blocks: int  # blocks of the longest stretch
    listed: int  # max entries that a row lists; 0: the stretch of every row ends at itself
    causal: bool  # within a run, the stretch of each row is one entry longer than that of the row before it
    parts: int  # max partial results of a slice
    items: int  # max items of `Work`
    row_bounds: tuple[int, ...]  # first row of each slice, and the number of rows: slices bound the partial results

    @property
    def name(self) -> str:
        """Name for people."""
        return f"{self.rows} rows{' with trees' if self.listed else ''}"

    @property
    def slices(self) -> int:
        """Number of slices that attend one after the other."""
        return len(self.row_bounds) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the parts of the flat tensor, in the order of `PagedRows`."""
        n, s = self.rows, self.sequences
        return (n, n, n, n, n, self.kept, s + 1, s, n * self.listed, n, n + 1, self.slices * BOUNDS, self.items)

    @property
    def size(self) -> int:
        """Size of the flat tensor."""
        return sum(self.sizes)


class PagedRows:
    """Views of a flat int64 tensor that holds the rows of a forward."""

    def __init__(self, shape: Shape, flat: Tensor) -> None:
        """Split `flat`, which has at least `shape.size` elements."""
        self.shape = shape
        parts = [flat[end - size : end] for end, size in zip(accumulate(shape.sizes), shape.sizes, strict=True)]
        self.ids, self.positions, self.entries, self.sequence, self.seen = parts[:5]  # [rows]
        self.kept, self.starts = parts[5], parts[6]  # [kept], [sequences + 1] first row
        self.slots = parts[7]  # [sequences] KV slot
        self.own = parts[8].view(shape.rows, shape.listed)  # indices of the listed entries, in order of depth
        self.own_count = parts[9]  # [rows] how many entries each row lists
        self.first_part, self.items = parts[10], parts[12]  # see `Work`
        self.bounds = parts[11].view(shape.slices, BOUNDS)


def exact_shape(segments: Sequence[Segment], kv: PagedKv) -> Shape:
    """Return the shape of a forward over `segments` without any padding."""
    chains = all(s.visible is None for s in segments)
    long = not chains and any(_is_long(s) for s in segments)
    runs = [run for s in segments for run in _runs(s, long)]
    rows = sum(len(s.ids) for s in segments)
    bounds, parts = _slices(segments, runs, kv)
    return Shape(
        rows=rows,
        kept=sum(len(s.keep) for s in segments),
        sequences=len(runs),
        queries=max(runs),
        blocks=max(-(-s.end // kv.block_size) for s in segments),
        listed=0 if chains else max(_listed(s, long) for s in segments),
        causal=chains or long,
        parts=parts,
        items=2 * total_parts(segments),
        row_bounds=bounds,
    )


def total_parts(segments: Sequence[Segment], listed: int | None = None) -> int:
    """Return an upper limit of the partial results of a forward over `segments`, whose rows list up to `listed`."""
    ends = (s.end if listed is None else min(s.end, s.prefix + max(1, listed)) for s in segments)
    return sum(max_parts(len(s.ids), end) for s, end in zip(segments, ends, strict=True))


def part_limit(kv: PagedKv) -> int:
    """Return the partial results that fit the memory of a slice."""
    kv_heads, dim = kv.keys.shape[3:]
    return max(1, MAX_PART_BYTES // (4 * kv_heads * kv.group * dim))


def tile_rows(kv: PagedKv) -> int:
    """Return the rows of a tile: their queries of one KV head fill a tensor core's tile."""
    return max(1, TILE_QUERIES // kv.group)


def _slices(segments: Sequence[Segment], runs: Sequence[int], kv: PagedKv) -> tuple[tuple[int, ...], int]:
    """Return the first row of each slice and the number of rows, and the most partial results of a slice.

    Slices begin at tiles. One with more partial results than fit the memory is a single tile.
    """
    rows, limit, tile = sum(runs), part_limit(kv), tile_rows(kv)
    if total_parts(segments) <= limit:
        return (0, rows), total_parts(segments)
    ends = np.repeat([s.end for s in segments], [len(s.ids) for s in segments])
    bounds, parts, largest, first = [0], 0, 0, 0
    for run in runs:
        for lead in range(first, first + run, tile):
            count = min(tile, first + run - lead)
            more = max_parts(count, int(ends[lead]))
            if parts and parts + more > limit:
                bounds.append(lead)
                parts = 0
            parts += more
            largest = max(largest, parts)
        first += run
    return (*bounds, rows), largest


def fits_bucket(segments: Sequence[Segment], listed: int) -> bool:
    """Return whether the rows fit a bucket whose rows list at most `listed` entries; 0: chains of one row only."""
    if not listed:
        return all(s.visible is None and len(s.ids) == 1 for s in segments)
    return all(_listed(s, causal=False) <= listed for s in segments)


def laid_out(segments: Sequence[Segment], kv: PagedKv, shape: Shape) -> IntArray:
    """Return the flat tensor for `segments`, padded to a shape that is large enough; its items may be fewer.

    Padding rows see only themselves. They write to the scratch block, which no other row reads.
    """
    chains, long = not shape.listed, bool(shape.listed) and shape.causal
    slots, counts, first, prefix = (
        np.array([(s.slot, len(s.ids), s.start, s.prefix) for s in segments], np.int64).reshape(-1, 4).T
    )
    n = int(counts.sum())
    padding = shape.rows - n
    slots = np.repeat(slots, counts)
    scratch = SCRATCH * kv.block_size + np.arange(padding) % kv.block_size
    index = np.arange(n) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    runs = [run for s in segments for run in _runs(s, True)] if long else counts
    starts = _starts(runs, n, shape)
    own_stretch = np.repeat(np.array([_as_chain(s, chains, long) for s in segments], np.bool_), counts)
    seen = np.where(own_stretch, index + 1, np.repeat(prefix, counts))
    seen = _joined([seen, np.full(padding, int(chains))])
    run_slots = np.full(shape.sequences, kv.slots, np.int64)
    real = starts[:-1] < n
    run_slots[real] = slots[starts[:-1][real]]
    own, own_count = _own(segments, kv, shape, long)
    if shape.listed:
        own[n:, 0] = scratch
        own_count[n:] = 1
    kept = kept_row_indices(segments) if segments else np.empty(0, np.int64)
    work = deal(starts, seen, own_count, shares=shape.queries > 1, tile=tile_rows(kv), row_bounds=shape.row_bounds)
    return np.concatenate(
        [
            _padded([s.ids for s in segments], shape.rows),
            _padded([s.positions for s in segments], shape.rows),
            kv.entries(slots, index),
            scratch,
            np.repeat(np.arange(shape.sequences), np.diff(starts)),
            seen,
            _padded([kept], shape.kept),
            starts,
            run_slots,
            own.ravel(),
            own_count,
            work.first_part,
            work.bounds.ravel(),
            work.items,
        ]
    )


def on_device(flat: IntArray, device: torch.device) -> Tensor:
    """Return the flat tensor on a device."""
    return torch.from_numpy(flat).to(device)


def _is_long(s: Segment) -> bool:
    """Return whether a segment is a chain that is too long to be listed."""
    return s.visible is None and len(s.ids) > LISTED


def _as_chain(s: Segment, chains: bool, long: bool) -> bool:
    return chains or (long and _is_long(s))


def _runs(s: Segment, long: bool) -> list[int]:
    """Return the rows of each run of a segment. With causal runs, each row of a tree is a run."""
    return [1] * len(s.ids) if long and not _is_long(s) else [len(s.ids)]


def _visible(s: Segment) -> BoolArray:
    return np.tri(len(s.ids), dtype=np.bool_) if s.visible is None else s.visible


def _listed(s: Segment, causal: bool) -> int:
    """Return the max entries that a row of a segment lists."""
    if s.visible is None:
        return 0 if causal and _is_long(s) else len(s.ids)
    return int(s.visible.sum(axis=1).max())


def _starts(runs: Sequence[int] | IntArray, rows: int, shape: Shape) -> IntArray:
    """Return the first row of each run [sequences + 1]. Padding rows are single runs in plain shapes, else the last."""
    starts = np.full(shape.sequences + 1, rows, np.int64)
    starts[0] = 0
    starts[1 : len(runs) + 1] = np.cumsum(runs, dtype=np.int64)
    if not shape.listed and shape.rows > rows:
        starts[len(runs) :] = np.arange(rows, shape.rows + 1)
    starts[-1] = shape.rows
    return starts


def _own(segments: Sequence[Segment], kv: PagedKv, shape: Shape, long: bool) -> tuple[IntArray, IntArray]:
    """Return the indices of the listed entries [rows, listed], and how many each row lists [rows]."""
    own = np.full((shape.rows, shape.listed), SCRATCH * kv.block_size, np.int64)
    count = np.zeros(shape.rows, np.int64)
    row = 0
    for s in segments if shape.listed else ():
        if not _as_chain(s, False, long):
            visible = _visible(s)
            rows, columns = np.nonzero(visible)
            rank = visible.cumsum(axis=1)[rows, columns] - 1
            own[row + rows, rank] = kv.entries(s.slot, s.prefix + columns)
            count[row : row + len(s.ids)] = visible.sum(axis=1)
        row += len(s.ids)
    return own, count


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _padded(parts: Sequence[IntArray], length: int) -> IntArray:
    joined = _joined(parts)
    return np.concatenate([joined, np.zeros(length - len(joined), np.int64)])
