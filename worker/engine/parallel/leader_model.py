"""A tensor parallel model, which the leader's engine uses like any other model.

The leader sends each forward to the followers before it runs it, so that all ranks run the same rows in the same order
on their shards. What happened to KV memory since the forward before travels in the same message. The leader alone
decides about trees, draws, slots and pages: of paged KV the followers get the numbers that their kernels read, and keep
no account. Their logits are discarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.errors import RankLost
from worker.engine.model.packed_model import PackedModel
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.step import PagedStep
from worker.engine.parallel.channel import RankChannel
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.segments import KvMove, KvMoves, Segment, Segments

_UNSET = -1  # None in the numbers of a command


class LeaderModel(PackedModel):
    """A packed model whose calls the followers repeat."""

    def __init__(
        self,
        model: PreTrainedModel,
        channel: RankChannel,
        number: int,
        *,
        slots: int,
        capacity: int,
        paged: bool | None = None,
        kv_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """Create the KV slots on all ranks; `number` is the model's index, the same on each."""
        self._channel: RankChannel | None = None  # None: each rank runs its equivalence check without commands
        self._pending: list[RankCommand] = []  # what the followers' KV slots lag behind
        numbers = (slots, capacity, _UNSET if paged is None else int(paged), _UNSET if kv_tokens is None else kv_tokens)
        channel.send([RankCommand(CommandKind.BUILD, number, numbers=numbers)])
        super().__init__(model, slots=slots, capacity=capacity, paged=paged, kv_tokens=kv_tokens, **options)
        self._channel, self._number = channel, number
        if self._buckets is not None:
            assert isinstance(self.kv, PagedKv)
            self._buckets.on_step = self._send_step
            self.kv.record_moves()

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run the rows on every rank; return the gathered logits. Raises RankLost if a rank fails."""
        if self._channel is None:
            return super().forward(segments)
        packed = Segments.of(segments)
        if self._buckets is None:
            self._send(RankCommand(CommandKind.FORWARD, self._number, segments=packed))
        try:
            return super().forward(packed)
        except Exception as error:
            # The followers are in the middle of the step and can't return to a common state.
            raise RankLost(f"A step of the replica failed: {error}") from error

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Compact the KV of every rank."""
        some = KvMoves.of(moves)
        if len(some):
            self._note(CommandKind.COMPACT, moves=some)
        super().compact(some)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy a prefix on every rank."""
        self._note(CommandKind.COPY_PREFIX, numbers=(source, target, length))
        super().copy_prefix(source, target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Free the memory of a slot beyond `length` entries on every rank."""
        self._note(CommandKind.TRUNCATE, numbers=(slot, length))
        super().truncate(slot, length)

    def clear(self) -> None:
        """Free the memory of every slot on every rank."""
        self._pending.clear()
        self._note(CommandKind.CLEAR)
        super().clear()

    def prepare(self) -> None:
        """Capture forwards, in the same order on every rank, and allocate buffers."""
        if self._buckets is None:
            self._send(RankCommand(CommandKind.PREPARE, self._number))
        super().prepare()

    def _note(self, kind: CommandKind, **given: Any) -> None:
        """Keep a command for the next message; paged KV keeps what it did by itself."""
        if self._channel is not None and self._buckets is None:
            self._pending.append(RankCommand(kind, self._number, **given))

    def _send_step(self, step: PagedStep) -> None:
        self._send(RankCommand(CommandKind.STEP, self._number, step=step))

    def _send(self, command: RankCommand) -> None:
        assert self._channel is not None
        self._channel.send([*self._pending, command])
        self._pending.clear()


class FollowerModels:
    """Executes the leader's commands on the models of this rank, which have the same indices as the leader's."""

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        """Take loaded models in the order of their indices."""
        self._loaded = models
        self._packed: dict[int, PackedModel] = {}

    def execute(self, command: RankCommand) -> None:
        """Do what the leader does, and discard the result."""
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
        elif command.kind is CommandKind.STEP:
            assert command.step is not None
            model.follow(command.step)
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
            raise AssertionError(f"{command.kind.name} is not a command for a model")
