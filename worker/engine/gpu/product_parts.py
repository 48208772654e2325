"""The parts of the inputs in which a GPU sums a product: fixed by the whole model, however many ranks split it.

The parts are added as the tree of `worker.engine.shards.shard`. How many of them a program adds up before it writes
their sum is free: sums of branches of the tree are as good as sums of parts, so it depends on rows and ranks, and
changes no bit. Programs that add up write and read fewer bytes; programs that don't are more, and keep a GPU busy.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIGNED = 128  # a part starts at a multiple of this many inputs of its unit
_MOST = 8  # parts of a product, unless ranks need more
_BUSY = 320  # tiles of a product that keep a GPU busy; smaller products are split over their inputs
_LONG = 100  # above this many steps of a sum, a product may be split twice as far
_LEAST_STEPS = 3  # of a part
_FEW_ROWS = 32  # up to here, ranks send a second sum for more programs: few rows send little
_LIVE = 3  # sums that a program holds in registers at once
_TILE = 64  # columns of a tile


@dataclass(frozen=True, slots=True)
class ProductParts:
    """The parts of a product of one rank: units of equal inputs, each cut into pieces."""

    unit: int  # inputs of a unit; ranks hold whole units
    pieces: int  # parts of a unit
    count: int  # parts that this rank holds
    ranks: int  # that sum the product: 1 for one whose inputs each rank has whole
    wanted: int  # sums that keep one GPU busy

    @property
    def share(self) -> int:
        """Inputs of a part; the last part of a unit may have fewer."""
        return _ceil(_ceil(self.unit, ALIGNED), self.pieces) * ALIGNED

    def branch(self, rows: int) -> int:
        """Return how many parts a program adds up for a product of this many rows: a branch of the tree of all."""
        wanted = self.wanted if self.ranks == 1 else 2 if rows <= _FEW_ROWS else 1
        branches = [size for size in _branches(self.count * self.ranks) if self.count % size == 0]
        held = [size for size in branches if _live(size) <= _LIVE]
        return next((size for size in reversed(held) if self.count // size <= wanted), held[0])

    def sums(self, rows: int) -> int:
        """Return how many sums this rank writes for a product of this many rows."""
        return self.count // self.branch(rows)


def parts_of_inputs(columns: int, inputs: int, parts: int, ranks: int = 1) -> ProductParts:
    """Return the parts of a product whose inputs the ranks share; `inputs` are those of a rank.

    `parts` are those of the model (`parts_of` in engine/shards/shard.py), 1 for one that is never split.
    """
    whole = inputs * ranks
    units = parts if whole % parts == 0 else 1
    wanted = _wanted(columns, whole)
    pieces = max(1, wanted // units)
    return ProductParts(whole // units, pieces, units * pieces // ranks, ranks, wanted)


def parts_of_columns(columns: int, inputs: int, parts: int, ranks: int = 1) -> ProductParts:
    """Return the parts of a product whose columns the ranks share; `columns` are those of a rank.

    A model that ranks may share is summed in up to twice the parts that it needs on one GPU, since a rank has fewer
    columns to keep its GPU busy.
    """
    pieces = _wanted(columns * ranks, inputs)
    if parts > 1:
        most = min(2 * pieces, _MOST, max(1, _ceil(inputs, ALIGNED) // _LEAST_STEPS))
        pieces = 1 << most.bit_length() - 1
    return ProductParts(inputs, pieces, pieces, 1, _wanted(columns, inputs))


def _wanted(columns: int, inputs: int) -> int:
    """Return the sums that keep one GPU busy with a product."""
    steps = _ceil(inputs, ALIGNED)
    wanted = _BUSY * (2 if steps > _LONG else 1) // _ceil(columns, _TILE)
    return max(1, min(_MOST, wanted, steps // _LEAST_STEPS))


def _branches(count: int) -> list[int]:
    """Return the sizes of the branches of a tree of parts, largest first."""
    sizes = [count]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes if sizes[-1] == 1 else [*sizes, 1]


def _live(size: int) -> int:
    """Return the sums that are held at once while a branch is added up."""
    return 1 if size == 1 else 1 + _live(size // 2 if size % 2 == 0 else 1)


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
