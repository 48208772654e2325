"""The channel between the ranks of a replica: orders from the first rank to the others, over torch.distributed.

Orders travel over gloo in main memory, the model's own sums over NCCL where there are GPUs. A channel that breaks means
that a rank is gone, and with it the replica.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from worker.engine.errors import RankLost
from worker.engine.parallel.commands import RankCommand, decode
from worker.engine.segments import IntArray

# Ranks without work wait for an order as long as there is none. That a rank is gone shows at once, as a closed
# connection or to whoever started it, so that no time limit is needed to find out.
_FOR_EVER = timedelta(days=365)
_HEAD = 2048  # numbers that travel in the first message of a command, its length among them; few need a second


class Channel:
    """This process's end."""

    def __init__(self, store: Path, rank: int, ranks: int, device: torch.device) -> None:
        """Meet the other ranks at a file that all of them can see; returns when everybody is there."""
        for library in ("GLOO", "NCCL"):  # ranks of a replica are on one machine: nothing has to listen elsewhere
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        self.rank, self.ranks = rank, ranks
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=distributed.FileStore(str(store), ranks),  # type: ignore[attr-defined]  # exported, says the manual
            rank=rank,
            world_size=ranks,
            timeout=_FOR_EVER,
        )

    def send(self, command: RankCommand) -> None:
        """Send an order to every other rank."""
        words = command.encode()
        head = np.zeros(_HEAD, np.int64)
        head[0] = len(words)
        first = words[: _HEAD - 1]
        head[1 : 1 + len(first)] = first
        self._send(head)
        if len(words) > len(first):
            self._send(words[len(first) :])

    def recv(self) -> RankCommand:
        """Wait for the next command."""
        head = self._receive(_HEAD)
        length = int(head[0])
        words = head[1 : 1 + length]
        if length > len(words):
            words = np.concatenate([words, self._receive(length - len(words))])
        return decode(words)

    def all_reduce_min(self, number: int) -> int:
        """Return the smallest of the numbers that the ranks bring; every rank must call it."""
        mine = torch.tensor([number])
        distributed.all_reduce(mine, distributed.ReduceOp.MIN)
        return int(mine)

    def close(self) -> None:
        """Leave."""
        distributed.destroy_process_group()

    def _send(self, words: IntArray) -> None:
        try:
            distributed.broadcast(torch.from_numpy(np.ascontiguousarray(words)), src=0)
        except RuntimeError as error:
            raise RankLost(f"A rank of the replica is gone: {error}") from error

    def _receive(self, count: int) -> IntArray:
        words = torch.empty(count, dtype=torch.int64)
        try:
            distributed.broadcast(words, src=0)
        except RuntimeError as error:
            raise RankLost(f"The first rank of the replica is gone: {error}") from error
        return words.numpy()
