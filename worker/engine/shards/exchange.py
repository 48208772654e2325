"""How the ranks of a split model share numbers: one exchange in each process."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, distributed

from worker.engine.errors import RankLost


class Exchange(Protocol):
    """How the ranks of a split model share numbers. Every rank must make the same calls."""

    rank: int
    ranks: int

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        """Fill `out` [ranks * n] with the flat tensors `own` [n] of all ranks; `own` may be a part of it."""

    def gather(self, own: Tensor) -> list[Tensor] | None:
        """Return the tensors of all ranks, which have one shape, on the first rank; None on the others."""


class DistributedExchange:
    """An exchange over torch's default process group."""

    def __init__(self) -> None:
        """Take the rank of this process; the group is initialised."""
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        """Fill `out` with the tensors of all ranks. Raises RankLost if one is gone."""
        try:
            distributed.all_gather_single(out, own)
        except RuntimeError as error:
            raise RankLost(f"A rank of the replica is gone: {error}") from error

    def gather(self, own: Tensor) -> list[Tensor] | None:
        """Return the tensors of all ranks on the first. Raises RankLost if one is gone."""
        every = [torch.empty_like(own) for _ in range(self.ranks)] if self.rank == 0 else None
        try:
            distributed.gather(own, every, dst=0)
        except RuntimeError as error:
            raise RankLost(f"A rank of the replica is gone: {error}") from error
        return every
