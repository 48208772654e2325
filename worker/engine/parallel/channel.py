"""The channel between the ranks of a tensor parallel replica: commands from the leader to the followers.

Commands are broadcast over gloo from main memory; the model's own all-reduces use NCCL on GPUs. If the channel breaks,
a rank is gone, and the replica must restart.
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

# Idle followers wait for the next command without a limit. No timeout is needed to detect a dead rank: its connection
# closes, and its parent process sees it exit.
_NO_TIMEOUT = timedelta(days=365)
_HEAD = 2048  # int64 words of a command's first message, which starts with its length; few commands need a second


class RankChannel:
    """This process's end of the channel."""

    def __init__(self, store: Path, rank: int, ranks: int, device: torch.device) -> None:
        """Connect to the other ranks through a file that all of them can open; return when all are connected."""
        for library in ("GLOO", "NCCL"):  # the ranks of a replica are on one machine: listen on loopback only
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        self.rank, self.ranks = rank, ranks
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=distributed.FileStore(str(store), ranks),  # type: ignore[attr-defined]  # documented as exported
            rank=rank,
            world_size=ranks,
            timeout=_NO_TIMEOUT,
        )

    def send(self, command: RankCommand) -> None:
        """Send a command to all followers."""
        words = command.encode()
        head = np.zeros(_HEAD, np.int64)
        head[0] = len(words)
        first = words[: _HEAD - 1]
        head[1 : 1 + len(first)] = first
        self._broadcast(head)
        if len(words) > len(first):
            self._broadcast(words[len(first) :])

    def recv(self) -> RankCommand:
        """Wait for the next command."""
        head = self._receive(_HEAD)
        length = int(head[0])
        words = head[1 : 1 + length]
        if length > len(words):
            words = np.concatenate([words, self._receive(length - len(words))])
        return decode(words)

    def all_reduce_min(self, number: int) -> int:
        """Return the minimum of the ranks' numbers; every rank must call it."""
        mine = torch.tensor([number])
        distributed.all_reduce(mine, distributed.ReduceOp.MIN)
        return int(mine)

    def close(self) -> None:
        """Close the connections to all ranks; further commands fail."""
        distributed.destroy_process_group()

    def _broadcast(self, words: IntArray) -> None:
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
