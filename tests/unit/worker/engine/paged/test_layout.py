"""Laws of the layout of paged rows: the compiled functions return the bits of their twin in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.worker.engine.paged.test_attention import STEPS
from worker.engine.paged import kv as paged_kv
from worker.engine.paged import rows
from worker.engine.paged.attention import reserve
from worker.engine.paged.compiled_layout import CompiledLayout, compiled_layout
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import BucketNeeds, Shape, bucket_needs, exact_shape, laid_out, laid_out_in_numpy
from worker.engine.paged.shape_buckets import BucketedForward
from worker.engine.segments import KvMove, KvMoves, Segment, Segments, chain


@pytest.fixture(scope="module")
def compiled() -> CompiledLayout:
    found = compiled_layout()
    assert found is not None, "there is no C compiler"
    return found


def small_blocks() -> PagedKv:
    """Return pages of which two slots share a prefix."""
    kv = PagedKv(1, 4, 1, 300, 1, torch.float32, torch.device("cpu"), block_size=16)
    reserve(Segments.of([chain(0, 0, [5] * 50, keep_last=True)]), kv)
    kv.copy_prefix(0, 2, 32)
    return kv


def shapes(kv: PagedKv, segments: Segments) -> list[Shape]:
    """Return the exact shape of a forward, and its bucket if there is one."""
    bucket = BucketedForward(lambda rows, _: (rows.ids, None), kv).shape_for(segments)
    return [exact_shape(segments, kv), *([bucket] if bucket else [])]


@pytest.mark.parametrize("step", STEPS)
def test_rows_are_laid_out_the_same(step: str) -> None:
    kv, segments = small_blocks(), Segments.of(STEPS[step])
    reserve(segments, kv)
    for shape in shapes(kv, segments):
        assert laid_out(segments, kv, shape).tolist() == laid_out_in_numpy(segments, kv, shape).tolist(), shape.name


def test_a_bucket_without_rows_is_laid_out_the_same() -> None:
    kv, nothing = small_blocks(), Segments.of([])
    ours = BucketedForward(lambda rows, _: (rows.ids, None), kv)
    for shape in (*ours.shapes[0][:3], *ours.shapes[rows.LISTED][:3]):
        assert laid_out(nothing, kv, shape).tolist() == laid_out_in_numpy(nothing, kv, shape).tolist()


@pytest.mark.parametrize("step", STEPS)
def test_the_same_bucket_is_chosen(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    segments = Segments.of(STEPS[step])
    needs: BucketNeeds = bucket_needs(segments)
    monkeypatch.setattr(rows, "compiled_layout", lambda: None)
    assert bucket_needs(segments) == needs


@pytest.mark.parametrize(
    ("segment", "prepared"),
    [
        (chain(0, 49, [5], keep_last=True), True),
        (chain(0, 64, [5], keep_last=True), False),  # a block is missing
        (chain(0, 20, [5], keep_last=True), False),  # the block is shared
        (chain(0, 40, [5] * 2, keep_last=True), False),  # a block behind it is stale
        (chain(1, 0, [5], keep_last=True), False),
        (chain(2, 31, [5], keep_last=True), False),
    ],
)
def test_blocks_are_reserved_exactly_where_they_are_not_writable(
    compiled: CompiledLayout, segment: Segment, prepared: bool
) -> None:
    kv, segments = small_blocks(), Segments.of([segment])
    assert compiled.prepared(segments, kv) is prepared
    ends = np.array([segment.end])
    ready = kv.writable(segments.slots, segments.starts, ends) & ~kv.holds_beyond(segments.slots, ends)
    assert bool(ready[0]) is prepared


def test_moves_go_between_the_same_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    some = small_blocks()
    moves = KvMoves.of([KvMove(0, 40, np.array([41, 45, 46])), KvMove(2, 30, np.array([31]))])
    found, owned = some.moved_entries(moves)
    monkeypatch.setattr(paged_kv, "compiled_layout", lambda: None)
    wanted, wanted_owned = some.moved_entries(moves)
    assert found.tolist() == wanted.tolist()
    assert (owned, wanted_owned) == (False, False), "slot 2 shares the block of its entry 30"
    assert some.moved_entries(KvMoves.of([moves[0]]))[1]
