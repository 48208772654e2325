"""Divide attention into items of equal size: one tile of rows, or one row, with one chunk of KV entries.

A long text becomes many items, so that many programs read its bytes, and not one. The attention of a row over
a chunk is a partial result; they are merged in the order of the chunks, so the dealing changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from worker.engine.segments import IntArray

CHUNK = 256  # KV entries of an item
ROW_SHIFT = 32  # an item is row << ROW_SHIFT | chunk
_Counts = TypeVar("_Counts", int, IntArray)
BOUNDS = 5  # numbers of a slice: first and end item of tiles, first and end item of rows, first partial result


@dataclass(frozen=True, slots=True)
class Work:
    """The items of a forward."""

    first_part: IntArray  # [rows + 1] index of each row's first partial result
    items: IntArray  # [n] those of tiles, then those of single rows
    bounds: IntArray  # [slices, BOUNDS]


def deal(
    starts: IntArray, seen: IntArray, own_count: IntArray, *, shares: bool, tile: int, row_bounds: tuple[int, ...]
) -> Work:
    """Return the items of rows with these stretches `seen` [rows] and numbers of listed entries [rows].

    With `shares`, up to `tile` rows of a run, which begin at `starts` [runs + 1], attend the chunks of their stretches
    together, and each row with listed entries attends its last chunks alone. Without, each row attends all its chunks.
    The slices begin at the rows `row_bounds`, whose last is the number of rows.
    """
    chunks = -(-(seen + own_count) // CHUNK)
    first_part = np.concatenate([[0], np.cumsum(chunks)])
    rows = np.arange(len(seen))
    if not shares:
        leads, of_tiles = rows[:0], _items(rows[:0], rows[:0], rows[:0])
        of_rows = _items(rows, np.zeros_like(chunks), chunks)
    else:
        leads = _leads(starts, tile)
        whole = np.where(own_count > 0, seen // CHUNK * CHUNK, seen)
        ends = -(-np.maximum.reduceat(whole, leads) // CHUNK)
        of_tiles = _items(leads, np.zeros_like(ends), ends)
        alone = np.flatnonzero(own_count)
        of_rows = _items(alone, seen[alone] // CHUNK, chunks[alone])
    items = np.concatenate([of_tiles, of_rows])
    if len(row_bounds) == 2:  # one slice
        return Work(first_part, items, np.array([[0, len(of_tiles), len(of_tiles), len(items), 0]]))
    cuts = np.array(row_bounds, np.int64)
    tile_cuts = np.searchsorted(of_tiles >> ROW_SHIFT, cuts)
    row_cuts = len(of_tiles) + np.searchsorted(of_rows >> ROW_SHIFT, cuts)
    bounds = np.stack([tile_cuts[:-1], tile_cuts[1:], row_cuts[:-1], row_cuts[1:], first_part[cuts[:-1]]], axis=1)
    return Work(first_part, items, bounds)


def max_parts(rows: _Counts, end: _Counts) -> _Counts:
    """Return the most partial results of `rows` rows that see no entry from `end` on."""
    return rows * -(-end // CHUNK)


def _leads(starts: IntArray, tile: int) -> IntArray:
    """Return the first row of each tile; the tiles of a run begin at its start."""
    lengths = np.diff(starts)
    tiles = -(-lengths // tile)
    return np.repeat(starts[:-1], tiles) + tile * _counted(tiles)


def _items(rows: IntArray, first: IntArray, end: IntArray) -> IntArray:
    """Return the items of the chunks first..end-1 of each row."""
    counts = np.maximum(end - first, 0)
    return (np.repeat(rows, counts) << ROW_SHIFT) + np.repeat(first, counts) + _counted(counts)


def _counted(counts: IntArray) -> IntArray:
    """Return 0..count-1 for each count, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
