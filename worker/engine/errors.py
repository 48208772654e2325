"""Errors of the engine, as one tree. A class docstring is the default message.

EngineError
├── ModelRefused            a model that can't be loaded, or not decoded exactly by the packed forward
│   └── TokenizersDiffer    target and draft encode the same text differently
├── NanLogits               the logits of some sequences are NaN: no token can be drawn for them
├── GrammarsRefused         the target's tokenizer can't be held by the grammar library exactly
├── RankLost                a tensor-parallel rank has died; the replica can't continue without it
│   └── MessageRefused      a message to a rank is damaged or out of order
├── SequenceTooLong         a sequence that needs more KV memory than there is
├── OutOfSlots              more sequences than KV slots: a bug of the caller
└── OutOfBlocks             more KV entries than memory: a bug of the scheduler
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.engine.sequence import Sequence as EngineSequence


class EngineError(Exception):
    """The engine can't do this."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ModelRefused(EngineError):
    """The model can't be decoded exactly by the packed forward."""


class TokenizersDiffer(ModelRefused):
    """Target and draft encode the same text differently."""


class NanLogits(EngineError):
    """The model's logits are NaN: no token can be drawn."""

    def __init__(self, sequences: Sequence[EngineSequence]) -> None:
        super().__init__()
        self.sequences = tuple(sequences)


class GrammarsRefused(EngineError):
    """This model decodes no grammars, because its tokenizer can't be held exactly."""


class RankLost(EngineError):
    """A tensor-parallel rank has died; the replica can't continue without it."""


class MessageRefused(RankLost):
    """A message from the first rank is damaged or out of order; the replica can't continue."""


class SequenceTooLong(EngineError):
    """A sequence needs more KV memory than there is."""


class OutOfSlots(EngineError):
    """All KV slots are taken."""


class OutOfBlocks(EngineError):
    """All blocks of KV memory are taken."""


def error_summary(error: Exception) -> str:
    """Return the first line of an error's message; with its class, unless it is an OSError or ValueError."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0].rstrip(":. ") if lines else ""
    plain = message and isinstance(error, OSError | ValueError)
    return message if plain else f"{type(error).__name__}: {message}".rstrip(": ")
