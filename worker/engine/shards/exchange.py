"""How the ranks of a split model share numbers: one exchange in each process.

On a GPU the sums of a product are exchanged twice a layer: each rank writes its own into `room_for_sums`, and the norm
behind the product adds what `sums_of_all` returns. Whether that is a tensor that was gathered, or the memory of the
other ranks, the order of the sum is the same, and so are its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, distributed

from worker.engine.errors import RankLost


@dataclass(frozen=True, slots=True, eq=False)
class PeerSums:
    """Sums in the memory of each rank, which a kernel of this rank reads in place."""

    addresses: Tensor  # [ranks] int64, on this rank's device: where the sums of each rank start
    each: int  # sums of a rank
    rank: int  # this one
    pads: Tensor | None = None  # [ranks] int64: addresses of each rank's flags; None: all sums are written already
    slots: int = 0  # flags for each rank

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.addresses)


class Exchange(Protocol):
    """How the ranks of a split model share numbers. Every rank must make the same calls."""

    rank: int
    ranks: int

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        """Fill `out` [ranks * n] with the flat tensors `own` [n] of all ranks; `own` may be a part of it."""

    def gather(self, own: Tensor) -> list[Tensor] | None:
        """Return the tensors of all ranks, which have one shape, on the first rank; None on the others."""

    def room_for_sums(self, sums: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return float32 memory [sums, rows, columns] for what this rank adds to the next `sums_of_all`."""

    def sums_of_all(self, own: Tensor) -> Tensor | PeerSums:
        """Return the sums of all ranks [ranks * sums, rows, columns] in order of rank, or where they are.

        `own` is what `room_for_sums` returned, once it is written. It may be overwritten at the next call but one.
        """


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

    def room_for_sums(self, sums: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return new memory."""
        return torch.empty(sums, rows, columns, device=device)

    def sums_of_all(self, own: Tensor) -> Tensor | PeerSums:
        """Gather the sums of all ranks. Raises RankLost if one is gone."""
        every = own.new_empty(self.ranks * len(own), *own.shape[1:])
        self.all_gather(every.view(-1), own.view(-1))
        return every
