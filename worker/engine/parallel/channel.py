"""The channel between the ranks of a tensor parallel replica: commands from the leader to the followers.

Commands are broadcast over gloo from main memory; the model's own all-reduces use NCCL on GPUs. If the channel breaks,
a rank is gone, and the replica must restart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from worker.engine.errors import RankLost
from worker.engine.parallel.commands import RankCommand
from worker.engine.parallel.messages import HEAD, body_length, opened, sealed
from worker.engine.segments import IntArray

# Idle followers wait for the next command without a limit. No timeout is needed to detect a dead rank: its connection
# closes, and its parent process sees it exit.
_NO_TIMEOUT = timedelta(days=365)
LEAST_WORDS = 2048  # of a broadcast


class RankChannel:
    """This process's end of the channel."""

    def __init__(self, store: Path, rank: int, ranks: int, device: torch.device) -> None:
        """Connect to the other ranks through a file that all of them can open; return when all are connected."""
        for library in ("GLOO", "NCCL"):  # the ranks of a replica are on one machine: listen on loopback only
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        self.rank, self.ranks = rank, ranks
        self._number = 0  # messages so far
        self._room = LEAST_WORDS  # words of the next broadcast, the same on every rank
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=distributed.FileStore(str(store), ranks),  # type: ignore[attr-defined]  # documented as exported
            rank=rank,
            world_size=ranks,
            timeout=_NO_TIMEOUT,
        )

    def send(self, commands: Sequence[RankCommand]) -> None:
        """Send commands to all followers as one message: one broadcast, unless it is much longer than the last one."""
        words = sealed(commands, self._number)
        first = np.zeros(self._room, np.int64)
        first[: len(words)] = words[: self._room]
        self._broadcast(first)
        if len(words) > self._room:
            self._broadcast(words[self._room :])
        self._received(len(words))

    def recv(self) -> list[RankCommand]:
        """Wait for the next message and return its commands. Raises MessageRefused if it is not the one that is due."""
        words = self._receive(self._room)
        length = HEAD + body_length(words, self._number)
        if length > self._room:
            words = np.concatenate([words, self._receive(length - self._room)])
        commands = opened(words, self._number)
        self._received(length)
        return commands

    def _received(self, length: int) -> None:
        """Make room for a message like the last one, whose length both ends know."""
        self._number += 1
        self._room = max(LEAST_WORDS, 1 << length.bit_length())

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
