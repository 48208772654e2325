"""Split the memory of a device among models: the weights of all first, then equal parts of what they leave free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from worker.sharing.messages import (
    FreeMemory,
    FromBroker,
    MayLoad,
    MeasureMemory,
    MemoryBudget,
    NeedMemory,
    WeightsLoaded,
)

Answers = list[tuple[int, FromBroker]]  # with the index of the model that each is for


@dataclass(slots=True)
class _Member:
    need: NeedMemory | None = None
    loaded: bool = False
    free_bytes: int | None = None


@dataclass(slots=True)
class MemorySplit:
    """What the models of a device have said about memory, and what each of them may use.

    The budget is fixed at the first start. A process that starts again gets the same one: the others still have theirs.
    """

    names: Sequence[str]
    budget_bytes: int | None = None
    _admitted: bool = False
    _members: list[_Member] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with models that have said nothing."""
        self._members = [_Member() for _ in self.names]

    def take(self, index: int, message: NeedMemory | WeightsLoaded | FreeMemory) -> Answers:
        """Record what a model says; return whom to answer."""
        member = self._members[index]
        match message:
            case NeedMemory():
                member.need = message
                return self._admit(index)
            case WeightsLoaded():
                member.loaded = True
                return self._measure(index)
            case FreeMemory():
                member.free_bytes = message.free_bytes
                return self._divide()

    def forget(self, index: int) -> None:
        """Forget what a model has said: its process has ended, and memory that others measured has changed."""
        self._members[index] = _Member()
        for member in self._members:
            member.free_bytes = None

    def _admit(self, index: int) -> Answers:
        """Let the models load, once all have said what they need and if it is free.

        One that starts again has fitted before: the memory of its last process may not be free yet.
        """
        if self._admitted:
            return [(index, MayLoad())]
        needs = [member.need for member in self._members if member.need is not None]
        if len(needs) < len(self._members):
            return []
        free_bytes = min(need.free_bytes for need in needs)
        needed = [need.needed_bytes for need in needs]
        self._admitted = sum(needed) <= free_bytes
        refusal = "" if self._admitted else _refusal(list(zip(self.names, needed, strict=True)), free_bytes)
        return [(n, MayLoad(refusal)) for n in range(len(needs))]

    def _measure(self, index: int) -> Answers:
        if self.budget_bytes is not None:
            return [(index, MemoryBudget(self.budget_bytes))]
        if not all(member.loaded for member in self._members):
            return []
        return [(n, MeasureMemory()) for n in range(len(self._members))]

    def _divide(self) -> Answers:
        free_bytes = [member.free_bytes for member in self._members if member.free_bytes is not None]
        if len(free_bytes) < len(self._members):
            return []
        self.budget_bytes = min(free_bytes) // len(self._members)
        return [(n, MemoryBudget(self.budget_bytes)) for n in range(len(self._members))]


def _refusal(needed: list[tuple[str, int]], free_bytes: int) -> str:
    each = " and ".join(f"{name} needs {_gb(size)}" for name, size in needed)
    return (
        f"the weights do not fit on this device: {each}, and {_gb(free_bytes)} are free; "
        "name fewer models in BASIC_TARGET, or set BASIC_QUANTIZATION"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
