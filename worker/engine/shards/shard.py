"""Shards of a model that ranks split by heads and columns, with the same bits for any number of ranks.

A product that is split over its columns has the same sums on every rank. One that is split over its inputs is summed
in parts of the inputs. Their number depends on the whole model only, and every number of ranks that splits the model
divides it. The parts are added as one fixed tree in float32: the halves of an even number of parts, or all of an odd
number, first to last. A rank sends the sum of its parts if they are a branch of that tree, else the sum of each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
from torch import Tensor

from worker.engine.segments import IntArray
from worker.engine.shards.exchange import Exchange

MAX_RANKS = 8  # of a replica: the GPUs of a machine that reach each other fast
_STEP = 2  # inputs that kernels read together


@dataclass(frozen=True, slots=True)
class Shard:
    """The share of a model that this process holds. A model that is served alone is one shard."""

    parts: int  # of each product that a split would split over its inputs
    exchange: Exchange | None = None  # None: there is one rank

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return 0 if self.exchange is None else self.exchange.rank

    @property
    def ranks(self) -> int:
        """Number of ranks that share the model."""
        return 1 if self.exchange is None else self.exchange.ranks

    @property
    def sums(self) -> int:
        """Sums of a product that a rank sends: one if its parts are a branch of the tree, else one of each part."""
        halves = self.ranks & (self.ranks - 1) == 0  # halving the parts gives each of the ranks its own
        return 1 if halves else self.parts // self.ranks

    def bounds(self, inputs: int) -> IntArray:
        """Return where this rank's parts of its `inputs` start and end, counted from its first input."""
        own = self.parts // self.ranks
        steps = inputs * self.ranks // _STEP
        edges = steps * np.arange(self.rank * own, (self.rank + 1) * own + 1) // self.parts * _STEP
        edges -= edges[0]
        edges[-1] = inputs  # an odd number of inputs, which only a model that is not split has
        bounds: IntArray = edges
        return bounds

    def share(self, count: int) -> slice:
        """Return this rank's share of `count` things that the ranks divide."""
        assert count % self.ranks == 0
        return slice(self.rank * count // self.ranks, (self.rank + 1) * count // self.ranks)


WHOLE = Shard(parts=1)  # a network that is never split, such as a draft head


def tp_sizes_of(heads: int, kv_heads: int) -> list[int]:
    """Return the numbers of ranks that heads and KV heads can be dealt out to evenly."""
    sizes = range(1, min(kv_heads, MAX_RANKS) + 1)
    return [ranks for ranks in sizes if kv_heads % ranks == 0 and heads % ranks == 0]


def parts_of(heads: int, kv_heads: int) -> int:
    """Return the parts in which a model's products are summed: the least number that every number of ranks divides."""
    return lcm(*tp_sizes_of(heads, kv_heads))


def added(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of parts as the fixed tree."""
    if len(parts) == 1:
        return parts[0]
    branch = 1 if len(parts) % 2 else len(parts) // 2
    total = added(parts[:branch])
    for at in range(branch, len(parts), branch):
        total = total + added(parts[at : at + branch])
    return total
