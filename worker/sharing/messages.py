"""Messages between the broker of a device and the processes that share it. They are pickled on the way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JoinDevice:
    """To the broker, first: this process serves the model with this index."""

    index: int


@dataclass(frozen=True, slots=True)
class NeedMemory:
    """To the broker, before the weights are loaded: the least bytes that they take, and the free bytes."""

    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class MayLoad:
    """From the broker: load the weights, unless there is a `refusal`."""

    refusal: str = ""


@dataclass(frozen=True, slots=True)
class WeightsLoaded:
    """To the broker: the weights are in memory."""


@dataclass(frozen=True, slots=True)
class MeasureMemory:
    """From the broker, once the weights of all models are in memory: say how many bytes are free."""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """To the broker: the free bytes."""

    free_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """From the broker: the bytes that a model may use beside its weights."""

    budget_bytes: int


@dataclass(frozen=True, slots=True)
class WantTurn:
    """To the broker: there is a step to run. Each wish has a number of its own."""

    number: int


@dataclass(frozen=True, slots=True)
class Turn:
    """From the broker: run steps, as the wish of this number asked. `contended`: others wait, so run one."""

    number: int
    contended: bool


@dataclass(frozen=True, slots=True)
class YieldTurn:
    """From the broker: others wait, so end the turn after the step that runs."""


@dataclass(frozen=True, slots=True)
class EndTurn:
    """To the broker: the turn has ended, or the wish for one. `used_s` is the time of its last step.

    `next_number`: there is another step to run, and this is the number of its wish; None: there is none.
    """

    used_s: float
    next_number: int | None


ToBroker = JoinDevice | NeedMemory | WeightsLoaded | FreeMemory | WantTurn | EndTurn
FromBroker = MayLoad | MeasureMemory | MemoryBudget | Turn | YieldTurn
