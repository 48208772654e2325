"""Paged KV: blocks of one pool, and a block table per slot. Slots with a common prefix share its full blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.engine.cpu.kernels import address
from worker.engine.errors import OutOfBlocks
from worker.engine.kv.dense import KvPair
from worker.engine.paged.compiled_layout import BlockTables, compiled_layout
from worker.engine.segments import BoolArray, IntArray, KvMove, KvMoves

SCRATCH = 0  # the block that padding rows write to; no slot holds it
NO_BLOCKS: IntArray = np.empty((3, 0), np.int64)


class BlockPool:
    """Blocks 1..count with reference counts: the number of slots that hold each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.counts = np.zeros(count + 1, np.int64)  # references of each block
        self._free = list(range(count, SCRATCH, -1))

    @property
    def free(self) -> int:
        """Number of blocks that no slot holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Number of blocks that a slot holds."""
        return int((self.counts > 0).sum())

    @property
    def free_blocks(self) -> list[int]:
        """Indices of the free blocks."""
        return list(self._free)

    def references(self, block: int) -> int:
        """Return the reference count of a block."""
        return int(self.counts[block])

    def exclusive(self, blocks: IntArray) -> BoolArray:
        """Return which of the blocks exactly one slot holds."""
        exclusive: BoolArray = self.counts[blocks] == 1
        return exclusive

    def allocate(self) -> int:
        """Return a free block, now with one reference; raises OutOfBlocks."""
        if not self._free:
            raise OutOfBlocks
        block = self._free.pop()
        self.counts[block] = 1
        return block

    def add_reference(self, block: int) -> None:
        """Add a reference to a block in use."""
        assert self.counts[block] > 0, f"block {block} is free"
        self.counts[block] += 1

    def drop_reference(self, block: int) -> None:
        """Drop a reference; free the block if it was the last."""
        assert self.counts[block] > 0, f"block {block} was freed twice"
        self.counts[block] -= 1
        if not self.counts[block]:
            self._free.append(block)


class PagedKv:
    """A `KvStore` in blocks: keys and values [layers, blocks, block size, kv_heads, head_dim], with `SCRATCH`."""

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        block_size: int,
        tokens: int | None = None,
        group: int = 1,
        in_fp8: bool = False,
        latent_dim: int = 0,
    ) -> None:
        """Allocate a pool for `slots` slots of up to `capacity` entries, tree rows included.

        `tokens` limits the entries of all blocks together; None: every slot in full. `group` is the number of query
        heads per KV head. With `latent_dim`, an entry's values are the first numbers of its keys: they are stored once.
        """
        self.group = group
        self.block_size = block_size
        width = _blocks(capacity, block_size)
        self.capacity = width * block_size
        full = slots * width
        self.pool = BlockPool(full if tokens is None else min(full, tokens // block_size))
        shape = (layers, self.pool.count + 1, block_size, kv_heads, head_dim)
        self._pair = KvPair(shape, dtype, device, in_fp8=in_fp8, in_one=latent_dim > 0)
        self.keys, self.values = self._pair.keys, self._pair.values
        self.in_fp8 = in_fp8  # with exponents [layers, blocks, block size, kv_heads]
        self.dtype = dtype  # of the rows of a forward
        self._pools = [store.flatten(1, 2) for store in self._pair.stores]  # views [layers, entries, …]
        # Block tables: the blocks of each slot, in order. The last row is that of padding rows.
        self.tables = np.full((slots + 1, width), SCRATCH, np.int64)
        self.device_tables = torch.from_numpy(self.tables).to(device)  # on a CPU the same memory
        self._changed: list[tuple[int, int]] = []  # slot and index of blocks that the device does not know yet
        self._moves: list[IntArray] | None = None  # entries that moved, for other ranks; None: there are none
        self._held = np.zeros(slots, np.int64)  # number of blocks of each slot
        arrays = map(address, (self.tables, self._held, self.pool.counts))
        self.layout = BlockTables(*arrays, width, slots, block_size)  # for compiled functions

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self._held)

    def blocks_of(self, slot: int) -> list[int]:
        """Return the blocks of a slot."""
        blocks: list[int] = self.tables[slot, : self._held[slot]].tolist()
        return blocks

    def entries(self, slot: IntArray | int, index: IntArray) -> IntArray:
        """Return the indices of a slot's entries in the flattened pool [blocks * block size]."""
        found: IntArray = self.tables[slot, index // self.block_size] * self.block_size + index % self.block_size
        return found

    def reserve(self, slot: int, start: int, end: int) -> None:
        """Make entries start..end-1 of a slot writable: add blocks, copy shared ones.

        Raises OutOfBlocks, before it changes anything, if the pool has too few free blocks.
        """
        assert end <= self.capacity, "rows beyond the end of their slot"
        first, held = start // self.block_size, int(self._held[slot])
        needed = _blocks(end, self.block_size)
        shared = [at for at in range(first, min(held, needed)) if self.pool.references(int(self.tables[slot, at])) > 1]
        if len(shared) + max(0, needed - held) > self.pool.free:
            raise OutOfBlocks
        for at in shared:
            self._unshare(slot, at, copied=at * self.block_size < start or (at + 1) * self.block_size > end)
        for at in range(held, needed):
            self._set_block(slot, at, self.pool.allocate())
        self._held[slot] = max(held, needed)

    def writable(self, slots: IntArray, starts: IntArray, ends: IntArray) -> BoolArray:
        """Return for which slots `reserve` has nothing to do: they hold these entries in blocks of their own."""
        first, needed = starts // self.block_size, -(-ends // self.block_size)
        writable: BoolArray = needed <= self._held[slots]
        for offset in range(int((needed - first).max(initial=0))):
            at = np.minimum(first + offset, needed - 1)
            writable &= self.pool.exclusive(self.tables[slots, at])
        return writable

    def holds_beyond(self, slots: IntArray, ends: IntArray) -> BoolArray:
        """Return for which slots `truncate` has something to do."""
        beyond: BoolArray = -(-ends // self.block_size) < self._held[slots]
        return beyond

    def truncate(self, slot: int, length: int) -> None:
        """Free the blocks of a slot beyond its first `length` entries."""
        kept = _blocks(length, self.block_size)
        if kept >= self._held[slot]:
            return
        for block in self.blocks_of(slot)[kept:]:
            self.pool.drop_reference(block)
        self.tables[slot, kept : self._held[slot]] = SCRATCH
        self._held[slot] = kept

    def sync_tables(self) -> None:
        """Copy new blocks to the tables on the device. Freed ones stay there: no row sees their entries."""
        self.show(self.pop_blocks())

    def pop_blocks(self) -> IntArray:
        """Return the blocks that slots took since the last call, [3, blocks]: slot, index in its table, block."""
        if not self._changed:
            return NO_BLOCKS
        slots, index = np.array(self._changed, np.int64).T
        self._changed.clear()
        return np.stack([slots, index, self.tables[slots, index]])

    def record_moves(self) -> None:
        """Record from now on which entries of the pool move, for `pop_moves`."""
        self._moves = []

    def pop_moves(self) -> list[IntArray]:
        """Return the recorded moves since the last call, each [2, entries]: where entries come from and go to."""
        moves = self._moves
        if not moves:
            return []
        self._moves = []
        return moves

    def follow(self, blocks: IntArray, moves: Sequence[IntArray]) -> None:
        """Repeat what another rank's store did: its moves in their order, and the blocks that its slots took."""
        for moved in moves:
            self._move(moved)
        self.tables[blocks[0], blocks[1]] = blocks[2]
        self.show(blocks)

    def show(self, blocks: IntArray) -> None:
        """Copy blocks [3, blocks] to the tables on the device."""
        if blocks.size and self.device_tables.device.type != "cpu":
            moved = torch.from_numpy(blocks).to(self.device_tables.device)
            self.device_tables[moved[0], moved[1]] = moved[2]

    def _set_block(self, slot: int, at: int, block: int) -> None:
        self.tables[slot, at] = block
        self._changed.append((slot, at))

    def write(self, layer: int, entries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values` [n, kv_heads, head_dim] at `entries` int64 [n], indices from `entries()`."""
        self._pair.write(keys, values, lambda store: store[layer].flatten(0, 1), entries)

    def layer(self, layer: int) -> tuple[Tensor | None, ...]:
        """Return the keys and values of a layer [blocks, block size, kv_heads, head_dim], and exponents or None."""
        exponents = self._pair.exponents or (None,)
        stores = (self.keys, self.values, exponents[0], exponents[-1])
        return tuple(None if store is None else store[layer] for store in stores)

    def read(self, layer: int, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [..., kv_heads, head_dim] at `entries` int64 [...], indices from `entries()`."""
        return self._pair.read(lambda store: store[layer].flatten(0, 1)[entries])

    def read_blocks(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [..., n * block size, kv_heads, head_dim] of `blocks` int64 [..., n]."""
        at = blocks.dim() - 1
        return self._pair.read(lambda store: store[layer][blocks].flatten(at, at + 1))

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move accepted entries of all layers down to the end of the committed prefix."""
        some = KvMoves.of(moves)
        if not len(some):
            return
        moved, owned = self.moved_entries(some)
        assert owned, "`reserve` unshared these blocks when the entries were written"
        if self._moves is not None:
            self._moves.append(moved)
        self._move(moved)

    def moved_entries(self, moves: KvMoves) -> tuple[IntArray, bool]:
        """Return the pool's entries that moves come from and go to [2, entries], and whether their slots own them."""
        compiled = compiled_layout()
        if compiled is not None:
            return compiled.moved_entries(moves, self)
        sources, targets = (self.entries(moves.entry_slots, index) for index in (moves.sources, moves.targets))
        return np.stack([sources, targets]), bool(self.pool.exclusive(targets // self.block_size).all())

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of slot `source` to slot `target`: share full blocks, copy the rest."""
        self.truncate(target, 0)
        full = length // self.block_size
        for at, block in enumerate(self.blocks_of(source)[:full]):
            self.pool.add_reference(block)
            self._set_block(target, at, block)
        self._held[target] = full
        if length % self.block_size:
            self.reserve(target, full * self.block_size, length)
            self._copy(int(self.tables[source, full]), int(self.tables[target, full]))

    def poison(self, slot: int, start: int = 0) -> None:
        """Overwrite a slot from `start` on, after unsharing its blocks (tests only)."""
        end = int(self._held[slot]) * self.block_size
        if start < end:
            self.reserve(slot, start, end)
            entries = torch.from_numpy(self.entries(slot, np.arange(start, end)))
            self._pair.poison((slice(None), entries // self.block_size, entries % self.block_size))

    def poison_free(self) -> None:
        """Overwrite all blocks that no slot holds, `SCRATCH` included (tests only)."""
        self._pair.poison((slice(None), [SCRATCH, *self.pool.free_blocks]))

    def check(self) -> None:
        """Assert that reference counts, block tables and the free list agree (tests only)."""
        held = [block for slot in range(self.slots) for block in self.blocks_of(slot)]
        assert SCRATCH not in held
        assert all(self.pool.references(block) == held.count(block) for block in range(1, self.pool.count + 1))
        assert self.pool.free + self.pool.used == self.pool.count
        assert len(set(self.pool.free_blocks)) == self.pool.free

    def _unshare(self, slot: int, at: int, copied: bool) -> None:
        """Replace a shared block of a slot by a new one; `copied` says whether to copy its contents."""
        old, new = int(self.tables[slot, at]), self.pool.allocate()
        if copied:
            self._copy(old, new)
        self.pool.drop_reference(old)
        self._set_block(slot, at, new)

    def _copy(self, source: int, target: int) -> None:
        if self._moves is not None:
            self._moves.append(np.array([[source], [target]]) * self.block_size + np.arange(self.block_size))
        for store in self._pair.stores:
            store[:, target] = store[:, source]

    def _move(self, moved: IntArray) -> None:
        """Move entries of the pool [2, entries]."""
        places = torch.from_numpy(moved).to(self.keys.device)
        source, target = places[0], places[1]
        for entries in self._pools:
            # The entries are gathered before anything is written: overlapping moves are safe.
            entries.index_copy_(1, target, entries.index_select(1, source))


def _blocks(entries: int, block_size: int) -> int:
    return -(-entries // block_size)
