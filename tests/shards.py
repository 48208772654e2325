"""The ranks of a split model as threads of one process, which exchange numbers in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.errors import RankLost
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.sharding import as_shard, read_shard, shard_config, shard_for
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.parallel.leader_model import FollowerModels
from worker.engine.parallel.messages import opened, sealed
from worker.engine.segments import IntArray
from worker.engine.shards.shard import Shard

T = TypeVar("T")


class Meeting:
    """Where the threads of all ranks meet to exchange tensors."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._changed = threading.Condition()
        self._given: list[list[Tensor]] = [[] for _ in range(ranks)]  # of each rank, call after call
        self._left: set[int] = set()

    def swap(self, rank: int, own: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks. Raises RankLost if one has left before this call."""
        with self._changed:
            self._given[rank].append(own.clone())
            call = len(self._given[rank])
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._absent(call) <= self._left)
            if self._absent(call):
                raise RankLost("a thread has left the meeting")
            return [given[call - 1] for given in self._given]

    def _absent(self, call: int) -> set[int]:
        return {rank for rank, given in enumerate(self._given) if len(given) < call}

    @contextmanager
    def attended(self, rank: int) -> Iterator[None]:
        """Attend the meeting as a rank; others that wait for it after that lose it."""
        try:
            yield
        finally:
            with self._changed:
                self._left.add(rank)
                self._changed.notify_all()


class ThreadExchange:
    """An `Exchange` of one rank of a meeting."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.ranks, self._meeting = rank, meeting.ranks, meeting

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        out.copy_(torch.cat(self._meeting.swap(self.rank, own)))

    def gather(self, own: Tensor) -> list[Tensor] | None:
        found = self._meeting.swap(self.rank, own)
        return found if self.rank == 0 else None


def on_ranks(
    model: PreTrainedModel,
    ranks: int,
    work: Callable[[PreTrainedModel, int], T],
    prepare: Callable[[PreTrainedModel], object] = fuse_layers,
) -> list[T]:
    """Run `work` on the prepared shard of each rank, in threads of one core each; return the results in their order."""
    meeting = Meeting(ranks)
    shards = _shards(model, [shard_for(model.config, ThreadExchange(meeting, rank)) for rank in range(ranks)])
    for shard in shards:
        prepare(shard)

    def run(rank: int) -> T:
        torch.set_num_threads(1)
        with meeting.attended(rank):
            return work(shards[rank], rank)

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, range(ranks)))


def _shards(model: PreTrainedModel, shards: Sequence[Shard]) -> list[PreTrainedModel]:
    """Return the shards of a model, read from its files as each rank does."""
    made = []
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for shard in shards:
            part: Any = type(model)(shard_config(model.config, shard.ranks))
            part = part.to(model.dtype)
            part.load_state_dict(read_shard([Path(folder) / "model.safetensors"], shard, model.dtype))
            part.set_attn_implementation(ATTENTION_NAME)
            as_shard(part.eval(), shard)
            made.append(part)
    return made


class ThreadChannel:
    """A `RankChannel` between threads: messages go through queues, as arrays."""

    def __init__(self, ranks: int) -> None:
        self._queues: list[SimpleQueue[IntArray]] = [SimpleQueue() for _ in range(1, ranks)]
        self.sent: list[IntArray] = []

    def send(self, commands: Sequence[RankCommand]) -> None:
        words = sealed(commands, len(self.sent))
        self.sent.append(words)
        for queue in self._queues:
            queue.put(words.copy())

    def follow(self, model: PreTrainedModel, rank: int) -> FollowerModels:
        """Execute the commands of the first rank until END."""
        models = FollowerModels([model])
        for number in count():
            for command in opened(self._queues[rank - 1].get(), number):
                if command.kind is CommandKind.END:
                    return models
                models.execute(command)
        raise AssertionError
