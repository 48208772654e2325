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
from worker.engine.model.language_model import PackedModel
from worker.engine.parallel.channel import Wire
from worker.engine.parallel.commands import Op, Order
from worker.engine.segments import KvMove, Segment

_UNSET = -1  # among the numbers of an order: the model decides by itself


class LeadingModel(PackedModel):
    """A packed model whose calls the other ranks follow."""

    def __init__(
        self,
        model: PreTrainedModel,
        wire: Wire,
        number: int,
        *,
        slots: int,
        capacity: int,
        paged: bool | None = None,
        kv_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """Build the KV slots of all ranks; `number` is the one that the model has on each of them."""
        self._wire: Wire | None = None  # the first forward is everybody's own
        numbers = (slots, capacity, _UNSET if paged is None else int(paged), _UNSET if kv_tokens is None else kv_tokens)
        wire.tell(Order(Op.BUILD, number, numbers=numbers))
        super().__init__(model, slots=slots, capacity=capacity, paged=paged, kv_tokens=kv_tokens, **options)
        self._wire, self._number = wire, number

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run the rows on every rank; return the logits, which are whole here. Raises RankLost if any rank fails."""
        if self._wire is None:
            return super().forward(segments)
        self._wire.tell(Order(Op.FORWARD, self._number, segments=tuple(segments)))
        try:
            return super().forward(segments)
        except Exception as error:
            # The others stand in the middle of the step and wait for us: there is no way back to a common state.
            raise RankLost(f"A step of the replica failed: {error}") from error

    def keep(self, moves: Sequence[KvMove]) -> None:
        """Bring accepted rows down on every rank."""
        assert self._wire is not None
        if any(not move.in_place for move in moves):
            self._wire.tell(Order(Op.KEEP, self._number, moves=tuple(moves)))
        super().keep(moves)

    def share(self, source: int, target: int, length: int) -> None:
        """Copy the beginning of a slot on every rank."""
        assert self._wire is not None
        self._wire.tell(Order(Op.SHARE, self._number, numbers=(source, target, length)))
        super().share(source, target, length)

    def release(self, slot: int, length: int) -> None:
        """Give the memory of a slot back on every rank."""
        if self._wire is not None:
            self._wire.tell(Order(Op.RELEASE, self._number, numbers=(slot, length)))
        super().release(slot, length)

    def clear(self) -> None:
        """Give the memory of every slot back on every rank."""
        assert self._wire is not None
        self._wire.tell(Order(Op.CLEAR, self._number))
        super().clear()

    def prepare(self) -> None:
        """Record the forwards that steps will replay on every rank."""
        assert self._wire is not None
        self._wire.tell(Order(Op.PREPARE, self._number))
        super().prepare()


class FollowingModels:
    """The models of a rank that follows, by number."""

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        """Take loaded models, in the order of their numbers."""
        self._loaded = models
        self._packed: dict[int, PackedModel] = {}

    def obey(self, order: Order) -> None:
        """Do what the first rank does, and forget the outcome."""
        if order.op is Op.BUILD:
            slots, capacity, paged, kv_tokens = order.numbers
            self._packed[order.model] = PackedModel(
                self._loaded[order.model],
                slots=slots,
                capacity=capacity,
                paged=None if paged == _UNSET else bool(paged),
                kv_tokens=None if kv_tokens == _UNSET else kv_tokens,
                judges=False,
            )
            return
        model = self._packed[order.model]
        if order.op is Op.FORWARD:
            model.forward(order.segments)
        elif order.op is Op.KEEP:
            model.keep(order.moves)
        elif order.op is Op.SHARE:
            source, target, length = order.numbers
            model.share(source, target, length)
        elif order.op is Op.RELEASE:
            slot, length = order.numbers
            model.release(slot, length)
        elif order.op is Op.CLEAR:
            model.clear()
        elif order.op is Op.PREPARE:
            model.prepare()
        else:
            raise AssertionError(f"{order.op.name} is no model's order")
