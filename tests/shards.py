"""The ranks of a split model as threads of one process, which exchange numbers in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
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
from worker.engine.shards.exchange import PeerSums
from worker.engine.shards.shard import Shard

T = TypeVar("T")


class Meeting:
    """Where the threads of all ranks meet to exchange tensors; with `turns`, one of them runs at a time."""

    def __init__(self, ranks: int, *, turns: bool = False) -> None:
        self.ranks = ranks
        self._turn = threading.Lock() if turns else None
        self._changed = threading.Condition()
        self._given: list[list[Tensor]] = [[] for _ in range(ranks)]  # of each rank, call after call
        self._left: set[int] = set()

    def swap(self, rank: int, own: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks. Raises RankLost if one has left before this call."""
        with self._changed:
            self._given[rank].append(own.clone())
            call = len(self._given[rank])
            self._changed.notify_all()
        with self._others_turn(), self._changed:
            self._changed.wait_for(lambda: self._absent(call) <= self._left)
            if self._absent(call):
                raise RankLost("a thread has left the meeting")
            return [given[call - 1] for given in self._given]

    @contextmanager
    def _others_turn(self) -> Iterator[None]:
        if self._turn is not None:
            self._turn.release()
        try:
            yield
        finally:
            if self._turn is not None:
                self._turn.acquire()

    def _absent(self, call: int) -> set[int]:
        return {rank for rank, given in enumerate(self._given) if len(given) < call}

    @contextmanager
    def attended(self, rank: int) -> Iterator[None]:
        """Attend the meeting as a rank; others that wait for it after that lose it."""
        with self._turn or nullcontext():
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

    def room_for_sums(self, sums: int, rows: int, columns: int, device: torch.device) -> Tensor:
        return torch.empty(sums, rows, columns, device=device)

    def sums_of_all(self, own: Tensor) -> Tensor | PeerSums:
        return torch.cat(self._meeting.swap(self.rank, own))


class PeerExchange(ThreadExchange):
    """A `ThreadExchange` whose ranks read the sums of the others in place, as those of GPUs do."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(meeting, rank)
        self._rooms: list[Tensor] = []  # two, taken in turn

    def room_for_sums(self, sums: int, rows: int, columns: int, device: torch.device) -> Tensor:
        numbers = sums * rows * columns
        if not self._rooms:
            self._rooms = [torch.empty(1 << 20, device=device) for _ in range(2)]
        self._rooms.reverse()
        return self._rooms[0][:numbers].fill_(torch.nan).view(sums, rows, columns)

    def sums_of_all(self, own: Tensor) -> Tensor | PeerSums:
        addresses = self._meeting.swap(self.rank, torch.tensor([own.data_ptr()]))
        return PeerSums(torch.cat(addresses).to(own.device), len(own), self.rank)


class Absent:
    """An exchange of a rank that never meets the others."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        raise AssertionError("no other rank is here")

    def gather(self, own: Tensor) -> list[Tensor] | None:
        raise AssertionError("no other rank is here")

    def room_for_sums(self, sums: int, rows: int, columns: int, device: torch.device) -> Tensor:
        raise AssertionError("no other rank is here")

    def sums_of_all(self, own: Tensor) -> Tensor | PeerSums:
        raise AssertionError("no other rank is here")


def on_ranks(
    model: PreTrainedModel,
    ranks: int,
    work: Callable[[PreTrainedModel, int], T],
    prepare: Callable[[PreTrainedModel], object] = fuse_layers,
    *,
    exchange: type[ThreadExchange] = ThreadExchange,
    turns: bool = False,
) -> list[T]:
    """Run `work` on the prepared shard of each rank, in threads of one core each; return the results in their order.

    With `turns`, threads change only where they meet: Triton's interpreter runs in one at a time.
    """
    meeting = Meeting(ranks, turns=turns)
    shards = _shards(model, [shard_for(model.config, exchange(meeting, rank)) for rank in range(ranks)])
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
        save_file(model.state_dict(), Path(folder) / "model.safetensors")
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
