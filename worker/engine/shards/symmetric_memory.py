"""The exchange of ranks on GPUs that reach each other's memory: kernels read the sums of the others in place.

torch's symmetric memory gives each rank the addresses of the others' buffers and of flags beside them, which kernels
raise and lower (`_meet` in gpu/kernels.py). A step makes no other call for its sums, so CUDA graphs capture all of it.
Two buffers take turns: a rank that has met the others in one exchange knows that all have read the one before.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, distributed
from torch.distributed import _symmetric_memory as symmetric_memory

from worker.engine.shards.exchange import DistributedExchange, PeerSums

log = logging.getLogger(__name__)

_BUFFERS = 2
_ROWS = 1024  # of the largest captured step; larger steps gather their sums
_SUMS = 2  # that a rank sends for few rows; for more rows it sends one
_FLAG_BYTES = 4


class SymmetricExchange(DistributedExchange):
    """An exchange through memory that all ranks can read."""

    def __init__(self, columns: int, device: torch.device) -> None:
        """Allocate the buffers for products with this many columns, on all ranks together.

        Raises RuntimeError, on all ranks alike, if a rank can't reach the memory of the others.
        """
        super().__init__()
        self._buffer, self._turn = _allocated(_BUFFERS * _ROWS * _SUMS * columns, device), 0
        buffers, pads, pad_bytes = _addresses(self._buffer)
        self._size = len(self._buffer) // _BUFFERS
        starts = [[start + turn * self._size * self._buffer.itemsize for start in buffers] for turn in range(_BUFFERS)]
        self._starts = torch.tensor(starts, device=device)  # [buffers, ranks] addresses
        self._pads = torch.tensor(pads, device=device)
        self._slots = min(_ROWS, pad_bytes // (_FLAG_BYTES * self.ranks))

    def room_for_sums(self, sums: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the buffer whose turn it is, or new memory for a step that is larger."""
        numbers = sums * rows * columns
        if numbers > self._size:
            return super().room_for_sums(sums, rows, columns, device)
        self._turn = (self._turn + 1) % _BUFFERS
        start = self._turn * self._size
        return self._buffer[start : start + numbers].view(sums, rows, columns)

    def sums_of_all(self, own: Tensor) -> Tensor | PeerSums:
        """Return where the sums of all ranks are."""
        if own.untyped_storage().data_ptr() != self._buffer.untyped_storage().data_ptr():
            return super().sums_of_all(own)
        return PeerSums(self._starts[self._turn], len(own), self.rank, self._pads, self._slots)


def exchange_on(device: torch.device, columns: int) -> DistributedExchange:
    """Return the fastest exchange that all ranks can use for sums of this many columns; all ranks must call it."""
    if device.type != "cuda":
        return DistributedExchange()
    try:
        return SymmetricExchange(columns, torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        log.warning("The ranks gather their sums with NCCL: %s", error, extra={"action": "no_symmetric_memory"})
        return DistributedExchange()


def _allocated(numbers: int, device: torch.device) -> Tensor:
    """Return a buffer of float32 that other ranks may read; raises RuntimeError if one of them has none."""
    buffer, reason = None, ""
    try:
        buffer = symmetric_memory.empty(numbers, dtype=torch.float32, device=device)
    except RuntimeError as error:
        reason = str(error)
    if not _all_ranks(buffer is not None) or buffer is None:
        raise RuntimeError(f"a rank has no symmetric memory: {reason}")
    return buffer


def _addresses(buffer: Tensor) -> tuple[list[int], list[int], int]:
    """Return the addresses of every rank's buffer and of its flags, which are zero, and the bytes of these."""
    handle, reason = None, ""
    try:
        handle = symmetric_memory.rendezvous(buffer, distributed.group.WORLD)  # type: ignore[arg-type]  # it is set
    except RuntimeError as error:
        reason = str(error)
    if not _all_ranks(handle is not None) or handle is None:
        raise RuntimeError(f"a rank can't reach the memory of the others: {reason}")
    own, size, dtype = distributed.get_rank(), buffer.shape, buffer.dtype
    others = {rank for rank in range(distributed.get_world_size()) if rank != own}
    starts = {rank: handle.get_remote_tensor(rank, size, dtype).data_ptr() for rank in others}
    starts[own] = buffer.data_ptr()
    return (
        [starts[rank] for rank in sorted(starts)],
        list(handle.signal_pad_ptrs),
        symmetric_memory.get_signal_pad_size(),
    )


def _all_ranks(can: bool) -> bool:
    """Return whether all ranks can."""
    answer = torch.tensor(int(can))
    distributed.all_reduce(answer, distributed.ReduceOp.MIN)
    return bool(answer)
