"""A model that is split over ranks, as the engine of the first rank sees it: one model like any other.

Every call is told to the other ranks before it runs here, so that all of them run the same rows in the same order over
their shares. They decide nothing: trees, draws and slots are the first rank's, whatever the others' numbers may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.errors import RankLost
from worker.engine.model.packed_model import PackedModel
from worker.engine.parallel.channel import Channel
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.segments import KvMove, Segment

_UNSET = -1  # among the numbers of a command: the model decides by itself


class LeaderModel(PackedModel):
    """A packed model whose calls the other ranks follow."""

    def __init__(
        self,
        model: PreTrainedModel,
        channel: Channel,
        number: int,
        *,
        slots: int,
        capacity: int,
        paged: bool | None = None,
        kv_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """Build the KV slots of all ranks; `number` is the one that the model has on each of them."""
        self._channel: Channel | None = None  # the first forward is everybody's own
        numbers = (slots, capacity, _UNSET if paged is None else int(paged), _UNSET if kv_tokens is None else kv_tokens)
        channel.send(RankCommand(CommandKind.BUILD, number, numbers=numbers))
        super().__init__(model, slots=slots, capacity=capacity, paged=paged, kv_tokens=kv_tokens, **options)
        self._channel, self._number = channel, number

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run the rows on every rank; return the logits, which are whole here. Raises RankLost if any rank fails."""
        if self._channel is None:
            return super().forward(segments)
        self._channel.send(RankCommand(CommandKind.FORWARD, self._number, segments=tuple(segments)))
        try:
            return super().forward(segments)
        except Exception as error:
            # The others stand in the middle of the step and wait for us: there is no way back to a common state.
            raise RankLost(f"A step of the replica failed: {error}") from error

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring accepted rows down on every rank."""
        assert self._channel is not None
        if any(not move.in_place for move in moves):
            self._channel.send(RankCommand(CommandKind.COMPACT, self._number, moves=tuple(moves)))
        super().compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the beginning of a slot on every rank."""
        assert self._channel is not None
        self._channel.send(RankCommand(CommandKind.COPY_PREFIX, self._number, numbers=(source, target, length)))
        super().copy_prefix(source, target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Give the memory of a slot back on every rank."""
        if self._channel is not None:
            self._channel.send(RankCommand(CommandKind.TRUNCATE, self._number, numbers=(slot, length)))
        super().truncate(slot, length)

    def clear(self) -> None:
        """Give the memory of every slot back on every rank."""
        assert self._channel is not None
        self._channel.send(RankCommand(CommandKind.CLEAR, self._number))
        super().clear()

    def prepare(self) -> None:
        """Record the forwards that steps will replay on every rank."""
        assert self._channel is not None
        self._channel.send(RankCommand(CommandKind.PREPARE, self._number))
        super().prepare()


class FollowerModels:
    """The models of a rank that follows, by number."""

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        """Take loaded models, in the order of their numbers."""
        self._loaded = models
        self._packed: dict[int, PackedModel] = {}

    def execute(self, command: RankCommand) -> None:
        """Do what the first rank does, and forget the outcome."""
        if command.kind is CommandKind.BUILD:
            slots, capacity, paged, kv_tokens = command.numbers
            self._packed[command.model] = PackedModel(
                self._loaded[command.model],
                slots=slots,
                capacity=capacity,
                paged=None if paged == _UNSET else bool(paged),
                kv_tokens=None if kv_tokens == _UNSET else kv_tokens,
                verifies=False,
            )
            return
        model = self._packed[command.model]
        if command.kind is CommandKind.FORWARD:
            model.forward(command.segments)
        elif command.kind is CommandKind.COMPACT:
            model.compact(command.moves)
        elif command.kind is CommandKind.COPY_PREFIX:
            source, target, length = command.numbers
            model.copy_prefix(source, target, length)
        elif command.kind is CommandKind.TRUNCATE:
            slot, length = command.numbers
            model.truncate(slot, length)
        elif command.kind is CommandKind.CLEAR:
            model.clear()
        elif command.kind is CommandKind.PREPARE:
            model.prepare()
        else:
            raise AssertionError(f"{command.kind.name} is no model's order")
