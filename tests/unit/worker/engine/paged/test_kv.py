"""Laws of paged KV: each block is free or referenced, and a write changes no other slot's entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.engine.errors import OutOfBlocks
from worker.engine.paged.kv import PagedKv
from worker.engine.segments import KvMove

SLOTS, CAPACITY, BLOCK = 3, 24, 4


def paged(tokens: int | None = None, in_fp8: bool = False) -> PagedKv:
    shape = (1, SLOTS, 1, CAPACITY, 1)
    return PagedKv(*shape, torch.float32, torch.device("cpu"), block_size=BLOCK, tokens=tokens, in_fp8=in_fp8)


def write(kv: PagedKv, slot: int, start: int, values: list[float]) -> None:
    kv.reserve(slot, start, start + len(values))
    entries = torch.from_numpy(kv.entries(slot, np.arange(start, start + len(values))))
    rows = torch.tensor(values).view(-1, 1, 1)
    kv.write(0, entries, rows, -rows)


def read(kv: PagedKv, slot: int, length: int) -> list[float]:
    entries = torch.from_numpy(kv.entries(slot, np.arange(length)))
    keys, values = kv.read(0, entries)
    assert torch.equal(keys, -values)
    return keys.flatten().tolist()


class PagedKvMachine(RuleBasedStateMachine):
    """Random writes, moves, prefix copies and truncations of a small pool, compared with plain lists."""

    in_fp8 = False

    def __init__(self) -> None:
        super().__init__()
        self.kv = paged(tokens=40, in_fp8=self.in_fp8)
        self.texts: list[list[float]] = [[] for _ in range(SLOTS)]
        self.written = 0

    def fresh(self, count: int) -> list[float]:
        """Return numbers that were never written, and that FP8 holds exactly: eight for each exponent."""
        numbers = range(self.written, self.written + count)
        self.written += count
        return [(1 + n % 8 / 8) * 2.0 ** (n // 8 % 200 - 90) for n in numbers]

    @rule(slot=st.integers(0, SLOTS - 1), back=st.integers(0, 6), count=st.integers(1, 9))
    def write(self, slot: int, back: int, count: int) -> None:
        text = self.texts[slot]
        start = max(0, len(text) - back)
        values = self.fresh(min(count, CAPACITY - start))
        if not values:
            return
        before = self.kv.blocks_of(slot)
        try:
            write(self.kv, slot, start, values)
        except OutOfBlocks:
            assert self.kv.blocks_of(slot) == before
            return
        self.texts[slot] = text[:start] + values + text[start + len(values) :]

    @rule(slot=st.integers(0, SLOTS - 1), data=st.data())
    def grow_a_tree_and_compact_a_path(self, slot: int, data: st.DataObject) -> None:
        start = len(self.texts[slot])
        nodes = min(6, CAPACITY - start)
        if nodes < 1 or self.kv.pool.free < 3:
            return
        values = self.fresh(nodes)
        write(self.kv, slot, start, values)
        path = sorted(data.draw(st.sets(st.integers(0, nodes - 1), max_size=nodes)))
        self.kv.compact([KvMove(slot, start, start + np.array(path, np.int64))])
        self.texts[slot] += [values[node] for node in path]

    @rule(source=st.integers(0, SLOTS - 1), step=st.integers(1, SLOTS - 1), data=st.data())
    @precondition(lambda self: self.kv.pool.free)
    def copy_prefix(self, source: int, step: int, data: st.DataObject) -> None:
        target = (source + step) % SLOTS
        length = data.draw(st.integers(0, len(self.texts[source])))
        self.kv.copy_prefix(source, target, length)
        self.texts[target] = self.texts[source][:length]

    @rule(slot=st.integers(0, SLOTS - 1), length=st.integers(0, CAPACITY))
    def truncate(self, slot: int, length: int) -> None:
        self.kv.truncate(slot, length)
        self.texts[slot] = self.texts[slot][: -(-length // BLOCK) * BLOCK]

    @rule(slot=st.integers(0, SLOTS - 1))
    def poison(self, slot: int) -> None:
        if self.kv.pool.free < len(self.kv.blocks_of(slot)):
            return
        self.kv.poison(slot)
        self.kv.poison_free()
        self.kv.truncate(slot, 0)
        self.texts[slot] = []

    @invariant()
    def blocks_add_up(self) -> None:
        self.kv.check()

    @invariant()
    def every_text_reads_as_it_was_written(self) -> None:
        for slot, text in enumerate(self.texts):
            assert read(self.kv, slot, len(text)) == text

    def teardown(self) -> None:
        for slot in range(SLOTS):
            self.kv.truncate(slot, 0)
        assert self.kv.pool.free == self.kv.pool.count


PagedKvMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestPagedKv = PagedKvMachine.TestCase


class PagedFp8Machine(PagedKvMachine):
    """The same in FP8: exponents go where their numbers go."""

    in_fp8 = True


PagedFp8Machine.TestCase.settings = settings(max_examples=5, stateful_step_count=25, deadline=None)
TestPagedFp8 = PagedFp8Machine.TestCase


def test_a_copied_prefix_shares_full_blocks() -> None:
    kv = paged()
    write(kv, 0, 0, [1.0] * 10)
    kv.copy_prefix(0, 1, 10)
    assert kv.blocks_of(0)[:2] == kv.blocks_of(1)[:2]
    assert kv.blocks_of(0)[2] != kv.blocks_of(1)[2]
    assert kv.pool.used == 4


def test_entries_are_writable_in_blocks_that_no_other_slot_holds() -> None:
    kv = paged()
    write(kv, 0, 0, [1.0] * 10)
    kv.copy_prefix(0, 1, 10)
    slots, starts, ends = np.array([0, 0, 1, 1]), np.array([3, 9, 9, 9]), np.array([10, 10, 10, 13])
    assert kv.writable(slots, starts, ends).tolist() == [False, True, True, False], "4 entries a block; 8 are shared"
    assert kv.holds_beyond(slots, ends - 4).tolist() == [True, True, True, False]


def test_overlapping_moves_copy_what_was_there_before() -> None:
    kv = paged()
    write(kv, 1, 0, [float(i) for i in range(8)])
    kv.compact([KvMove(1, 2, np.array([3, 4, 6]))])
    assert read(kv, 1, 8) == [0, 1, 3, 4, 6, 5, 6, 7]


def test_a_reservation_beyond_the_pool_is_refused_and_changes_nothing() -> None:
    kv = paged(tokens=20)
    write(kv, 0, 0, [1.0] * 16)
    with pytest.raises(OutOfBlocks):
        kv.reserve(1, 0, 8)
    assert kv.blocks_of(1) == []
    kv.check()


def test_a_block_is_freed_once() -> None:
    kv = paged()
    block = kv.pool.allocate()
    kv.pool.drop_reference(block)
    with pytest.raises(AssertionError):
        kv.pool.drop_reference(block)
