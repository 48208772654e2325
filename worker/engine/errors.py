"""What the engine refuses, as one tree. A class docstring is the default message.

EngineError
├── ModelRefused            a model that the packed forward can't decode exactly, or can't load
│   └── TokenizersDiffer    target and draft give different ids to the same text
├── NanLogits              the scores of some sequences hold NaN, so that nothing can be drawn for them
├── RankLost                a rank of the replica is gone, and the others can't go on without it
├── OutOfSlots              more sequences than KV slots: a bug of the caller
└── OutOfBlocks             more KV entries than there is memory for: a bug of whoever admits sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.engine.sequence import Sequence as EngineSequence


class EngineError(Exception):
    """The engine can't do this."""

    def __init__(self, message: str | None = None) -> None:
        """Keep the message; default: the class docstring."""
        super().__init__(message or (type(self).__doc__ or "").strip())


class ModelRefused(EngineError):
    """The model can't be decoded exactly by the packed forward."""


class TokenizersDiffer(ModelRefused):
    """Target and draft give different ids to the same text."""


class NanLogits(EngineError):
    """The model's scores for a text are not numbers (NaN), so that no token can be drawn."""

    def __init__(self, sequences: Sequence[EngineSequence]) -> None:
        """Keep the sequences that these scores are for."""
        super().__init__()
        self.sequences = tuple(sequences)


class RankLost(EngineError):
    """A rank of the replica is gone, and the others can't go on without it."""


class OutOfSlots(EngineError):
    """Every KV slot is taken."""


class OutOfBlocks(EngineError):
    """Every block of KV memory is taken."""
