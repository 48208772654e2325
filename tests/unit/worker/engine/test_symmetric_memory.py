"""The exchange through memory that all ranks can read, with a plain tensor as each rank's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from worker.engine.shards import symmetric_memory
from worker.engine.shards.exchange import PeerSums
from worker.engine.shards.symmetric_memory import SymmetricExchange

CPU = torch.device("cpu")
RANKS, RANK, COLUMNS, PAD_BYTES = 4, 2, 16, 512


class Memories:
    """What torch's symmetric memory gives to a rank: its own memory, and tensors over that of the others."""

    def __init__(self) -> None:
        self.others: dict[int, Tensor] = {}
        self.pads = [torch.zeros(PAD_BYTES // 4, dtype=torch.int32) for _ in range(RANKS)]

    def get_remote_tensor(self, rank: int, size: torch.Size, dtype: torch.dtype) -> Tensor:
        return self.others.setdefault(rank, torch.empty(size, dtype=dtype))

    @property
    def signal_pad_ptrs(self) -> list[int]:
        return [pad.data_ptr() for pad in self.pads]


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> Memories:
    made = Memories()
    monkeypatch.setattr(
        "torch.distributed._symmetric_memory.empty", lambda n, dtype, device: torch.empty(n, dtype=dtype)
    )
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", lambda *_: made)
    monkeypatch.setattr("torch.distributed._symmetric_memory.get_signal_pad_size", lambda: PAD_BYTES)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: RANK)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: RANKS)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: None)
    monkeypatch.setattr("worker.engine.shards.symmetric_memory._ROWS", 8)
    return made


def test_kernels_get_the_places_of_all_sums_and_of_the_flags_of_all_ranks(memories: Memories) -> None:
    exchange = SymmetricExchange(COLUMNS, CPU)
    for _ in range(4):
        own = exchange.room_for_sums(2, 3, COLUMNS, CPU)
        sums = exchange.sums_of_all(own)
        assert isinstance(sums, PeerSums)
        assert (sums.each, sums.rank, sums.ranks) == (2, RANK, RANKS)
        offset = int(sums.addresses[0]) - memories.others[0].data_ptr()
        assert sums.addresses[RANK] == own.data_ptr()
        starts = [memories.others[rank].data_ptr() + offset for rank in (0, 1, 3)]
        assert [int(sums.addresses[rank]) for rank in (0, 1, 3)] == starts
        assert sums.pads is not None
        assert sums.pads.tolist() == memories.signal_pad_ptrs
        assert sums.slots * RANKS * 4 <= PAD_BYTES


@pytest.mark.usefixtures("memories")
def test_a_buffer_is_written_again_only_after_the_next_exchange() -> None:
    exchange = SymmetricExchange(COLUMNS, CPU)
    places = [exchange.room_for_sums(1, 4, COLUMNS, CPU).data_ptr() for _ in range(4)]
    assert places[0] != places[1]
    assert places[2:] == places[:2]


def test_the_sums_of_a_step_that_is_too_large_are_gathered(memories: Memories, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = SymmetricExchange(COLUMNS, CPU)
    gathered: list[Any] = []
    monkeypatch.setattr("torch.distributed.all_gather_single", lambda *given: gathered.append(given))
    own = exchange.room_for_sums(1, 100, COLUMNS, CPU)
    every = exchange.sums_of_all(own)
    assert isinstance(every, Tensor)
    assert every.shape == (RANKS, 100, COLUMNS)
    assert len(gathered) == 1
    assert not memories.others[0].is_set_to(own)


@pytest.mark.usefixtures("memories")
@pytest.mark.parametrize("what", ["empty", "rendezvous"])
def test_ranks_that_reach_no_memory_gather_instead(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDASymmetricMemory: no peer access")

    monkeypatch.setattr(f"torch.distributed._symmetric_memory.{what}", fails)
    assert type(symmetric_memory.exchange_on(torch.device("cuda"), COLUMNS)).__name__ == "DistributedExchange"


@pytest.mark.usefixtures("memories")
def test_no_rank_uses_the_memory_that_another_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda answer, _: answer.zero_())
    with pytest.raises(RuntimeError, match="a rank has no symmetric memory"):
        SymmetricExchange(COLUMNS, CPU)
