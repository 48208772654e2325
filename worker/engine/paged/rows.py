"""The rows of one forward as tensors of a fixed shape: token ids, KV entries to write, what each row sees."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from worker.engine.paged.compiled_layout import compiled_layout
from worker.engine.paged.kv import SCRATCH, PagedKv
from worker.engine.paged.work import BOUNDS, deal, max_parts
from worker.engine.segments import BoolArray, IntArray, Segments, ranges

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

    def __hash__(self) -> int:
        """Hash the sizes in which buckets differ: shapes are looked up in every forward."""
        return hash((self.rows, self.listed, self.parts))

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


def exact_shape(segments: Segments, kv: PagedKv) -> Shape:
    """Return the shape of a forward over `segments` without any padding."""
    chains = bool(segments.chains.all())
    long = segments.chains & (segments.counts > LISTED)  # chains that are too long to be listed
    causal_runs = not chains and bool(long.any())
    runs = _runs(segments, long) if causal_runs else segments.counts
    listed_chains = segments.counts[segments.chains & ~long if causal_runs else segments.chains]
    listed = int(max(listed_chains.max(initial=0), segments.visible_counts.max(initial=0)))
    total = total_parts(segments)
    bounds, parts = _slices(segments, runs, kv, total)
    return Shape(
        rows=segments.num_rows,
        kept=len(segments.kept),
        sequences=len(runs),
        queries=int(runs.max()),
        blocks=int(-(-segments.ends.max() // kv.block_size)),
        listed=0 if chains else listed,
        causal=chains or causal_runs,
        parts=parts,
        items=2 * total,
        row_bounds=bounds,
    )


def total_parts(segments: Segments, listed: int | None = None) -> int:
    """Return an upper limit of the partial results of a forward over `segments`, whose rows list up to `listed`."""
    ends = segments.ends if listed is None else np.minimum(segments.ends, segments.prefixes + max(1, listed))
    return int(max_parts(segments.counts, ends).sum())


def part_limit(kv: PagedKv) -> int:
    """Return the partial results that fit the memory of a slice."""
    kv_heads, dim = kv.keys.shape[3:]
    return max(1, MAX_PART_BYTES // (4 * kv_heads * kv.group * dim))


def tile_rows(kv: PagedKv) -> int:
    """Return the rows of a tile: their queries of one KV head fill a tensor core's tile."""
    return max(1, TILE_QUERIES // kv.group)


def _slices(segments: Segments, runs: IntArray, kv: PagedKv, total: int) -> tuple[tuple[int, ...], int]:
    """Return the first row of each slice and the number of rows, and the most partial results of a slice.

    All slices together have up to `total`.

    Slices begin at tiles. One with more partial results than fit the memory is a single tile.
    """
    rows, limit, tile = segments.num_rows, part_limit(kv), tile_rows(kv)
    if total <= limit:
        return (0, rows), total
    ends = segments.per_row(segments.ends).tolist()
    bounds, parts, largest, first = [0], 0, 0, 0
    for run in runs.tolist():
        for lead in range(first, first + run, tile):
            count = min(tile, first + run - lead)
            more = int(max_parts(count, ends[lead]))
            if parts and parts + more > limit:
                bounds.append(lead)
                parts = 0
            parts += more
            largest = max(largest, parts)
        first += run
    return (*bounds, rows), largest


@dataclass(frozen=True, slots=True)
class BucketNeeds:
    """What decides on the bucket of a forward."""

    listed: int | None  # entries that rows list in its bucket: 0 for chains of one row; None: it fits no bucket
    parts: int  # upper limit of its partial results there


def bucket_needs(segments: Segments) -> BucketNeeds:
    """Return what the rows need of a bucket."""
    compiled = compiled_layout()
    if compiled is None:
        plain = bool(segments.chains.all()) and segments.num_rows == len(segments)
        longest = int(segments.counts[segments.chains].max(initial=0))
        longest = max(longest, int(segments.visible_counts.max(initial=0)))
        parts, parts_if_listed = total_parts(segments, 0), total_parts(segments, LISTED)
    else:
        plain, longest, parts, parts_if_listed = compiled.measure(segments, LISTED)
    if plain:
        return BucketNeeds(0, parts)
    return BucketNeeds(LISTED if longest <= LISTED else None, parts_if_listed)


def laid_out(segments: Segments, kv: PagedKv, shape: Shape) -> IntArray:
    """Return the flat tensor for `segments`, padded to a shape that is large enough; its items may be fewer.

    Padding rows see only themselves. They write to the scratch block; what it holds reaches no other row.
    """
    compiled = compiled_layout()
    if compiled is not None and shape.slices == 1:
        return compiled.lay_out(segments, kv, shape, tile_rows(kv), LISTED)
    return laid_out_in_numpy(segments, kv, shape)


def laid_out_in_numpy(segments: Segments, kv: PagedKv, shape: Shape) -> IntArray:
    """Return what `laid_out` returns, without compiled functions."""
    long = segments.chains & (segments.counts > LISTED)
    n = segments.num_rows
    padding = shape.rows - n
    slots, index = segments.per_row(segments.slots), segments.entries
    scratch = SCRATCH * kv.block_size + np.arange(padding) % kv.block_size
    starts = _starts(_runs(segments, long) if shape.listed and shape.causal else segments.counts, n, shape)
    # Rows whose stretch ends at the row itself: all of a plain shape, and chains that are too long to be listed.
    causal = np.ones(n, np.bool_) if not shape.listed else segments.per_row(long) & shape.causal
    seen = np.where(causal, index + 1, segments.per_row(segments.prefixes))
    seen = np.concatenate([seen, np.full(padding, int(not shape.listed))])
    run_slots = np.full(shape.sequences, kv.slots, np.int64)
    real = starts[:-1] < n
    run_slots[real] = slots[starts[:-1][real]]
    own, own_count = _own(segments, kv, shape, causal)
    if shape.listed:
        own[n:, 0] = scratch
        own_count[n:] = 1
    work = deal(starts, seen, own_count, shares=shape.queries > 1, tile=tile_rows(kv), row_bounds=shape.row_bounds)
    return np.concatenate(
        [
            _padded(segments.ids, shape.rows),
            _padded(segments.positions, shape.rows),
            kv.entries(slots, index),
            scratch,
            np.repeat(np.arange(shape.sequences), np.diff(starts)),
            seen,
            _padded(segments.kept, shape.kept),
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


def _runs(segments: Segments, long: BoolArray) -> IntArray:
    """Return the rows of each causal run: a long chain is one, and so is each row of the others."""
    runs: IntArray = np.repeat(np.where(long, segments.counts, 1), np.where(long, 1, segments.counts))
    return runs


def _starts(runs: IntArray, rows: int, shape: Shape) -> IntArray:
    """Return the first row of each run [sequences + 1]. Padding rows are single runs in plain shapes, else the last."""
    starts = np.full(shape.sequences + 1, rows, np.int64)
    starts[0] = 0
    starts[1 : len(runs) + 1] = np.cumsum(runs, dtype=np.int64)
    if not shape.listed and shape.rows > rows:
        starts[len(runs) :] = np.arange(rows, shape.rows + 1)
    starts[-1] = shape.rows
    return starts


def _own(segments: Segments, kv: PagedKv, shape: Shape, causal: BoolArray) -> tuple[IntArray, IntArray]:
    """Return the indices of the listed entries [rows, listed], and how many each row lists [rows].

    A row of a tree lists what it sees behind the prefix, a row of a chain that is not `causal` the chain up to itself.
    """
    own = np.full((shape.rows, shape.listed), SCRATCH * kv.block_size, np.int64)
    count = np.zeros(shape.rows, np.int64)
    if not shape.listed:
        return own, count
    n = segments.num_rows
    index_in_segment = ranges(np.zeros(len(segments), np.int64), segments.counts)
    chained = segments.per_row(segments.chains) & ~causal
    count[:n] = np.where(chained, index_in_segment + 1, segments.visible_counts)
    rows = np.repeat(np.arange(n), count[:n])
    rank = ranges(np.zeros(n, np.int64), count[:n])
    entry = rank.copy()  # behind the prefix
    entry[~chained[rows]] = segments.visible
    slots, prefixes = segments.per_row(segments.slots), segments.per_row(segments.prefixes)
    own[rows, rank] = kv.entries(slots[rows], prefixes[rows] + entry)
    return own, count


def _padded(part: IntArray, length: int) -> IntArray:
    return part if len(part) == length else np.concatenate([part, np.zeros(length - len(part), np.int64)])
