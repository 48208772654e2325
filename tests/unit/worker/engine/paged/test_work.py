"""Dealing out attention: every chunk that a row sees is attended once, in items of one chunk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.paged import work
from worker.engine.paged.work import BOUNDS, CHUNK, ROW_SHIFT, deal
from worker.engine.segments import IntArray

TILE = 4


def array(*values: int) -> IntArray:
    return np.array(values, np.int64)


def attended(found: work.Work, starts: IntArray, seen: IntArray, listed: IntArray) -> list[tuple[int, int]]:
    """Return the (row, chunk) of every partial result, in the order in which the kernels write them."""
    written = []
    for tile_first, tile_end, row_first, row_end, _ in found.bounds.tolist():
        for item in found.items[tile_first:tile_end].tolist():
            lead, chunk = item >> ROW_SHIFT, item % (1 << ROW_SHIFT)
            run_end = next(end for end in starts.tolist() if end > lead)
            for row in range(lead, min(run_end, lead + TILE)):
                whole = seen[row] // CHUNK * CHUNK if listed[row] else seen[row]
                written += [(row, chunk)] if chunk * CHUNK < whole else []
        written += [(item >> ROW_SHIFT, item % (1 << ROW_SHIFT)) for item in found.items[row_first:row_end].tolist()]
    return written


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3 * CHUNK), st.booleans()), min_size=1, max_size=5))
def test_each_chunk_that_a_row_sees_is_attended_once(runs: list[tuple[int, int, bool]]) -> None:
    """Runs of a chain, whose rows each see one entry more, or of a tree behind a stretch, whose rows list entries."""
    starts = np.concatenate([[0], np.cumsum([length for length, _, _ in runs])])
    seen = np.concatenate([prefix + (0 if tree else np.arange(1, n + 1)) + np.zeros(n) for n, prefix, tree in runs])
    listed = np.concatenate([np.full(n, 3 * tree) for n, _, tree in runs])
    seen, listed = seen.astype(np.int64), listed.astype(np.int64)
    expected = [(row, c) for row in range(len(seen)) for c in range(-(-(seen[row] + listed[row]) // CHUNK))]
    for row_bounds in ((0, len(seen)), tuple(starts.tolist())):
        found = deal(starts, seen, listed, shares=True, tile=TILE, row_bounds=row_bounds)
        assert sorted(attended(found, starts, seen, listed)) == expected
        assert found.first_part.tolist() == [sum(row < r for row, _ in expected) for r in range(len(seen) + 1)]
        assert found.bounds[:, BOUNDS - 1].tolist() == found.first_part[list(row_bounds[:-1])].tolist()


def test_rows_without_a_common_stretch_attend_alone() -> None:
    found = deal(np.arange(3), array(CHUNK + 1, 5), array(0, 0), shares=False, tile=TILE, row_bounds=(0, 2))
    assert found.items.tolist() == [0, 1, 1 << ROW_SHIFT]
    assert found.bounds.tolist() == [[0, 0, 0, 3, 0]]


@pytest.mark.parametrize("programs", [8, 64])
def test_a_long_text_among_short_ones_takes_no_program_more_than_its_share(programs: int) -> None:
    seen = array(32_000, *[800] * 63)
    found = deal(np.arange(65), seen, np.zeros_like(seen), shares=False, tile=TILE, row_bounds=(0, 64))
    entries = sum(-(-int(n) // CHUNK) for n in seen) * CHUNK
    assert CHUNK * -(-len(found.items) // programs) <= entries / programs + CHUNK
