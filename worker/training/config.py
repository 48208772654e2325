"""The recipe of a draft: every number that decides what comes out of the training. It stands in the draft's card."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What kind of draft is trained."""

    HEAD = "head"  # a small network over the target's hidden states, blind without the target
    MODEL = "model"  # a small language model of its own


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a draft is made. The same recipe and seed on the same machine give the same weights."""

    kind: Kind = Kind.HEAD
    seed: int = 0
    tokens: int = 600_000  # that the target writes, prompts not counted
    answer_tokens: int = 224  # of one answer at most
    greedy_share: float = 0.7  # of the answers; the others are written at temperature 1
    held_out: int = 32  # texts kept from the training, to measure on
    epochs: int = 3
    rows: int = 8  # texts in one update
    learning_rate: float = 1e-3
    unroll: int = 3  # steps that the draft is trained to see ahead on its own outputs
    unroll_decay: float = 0.8  # weight of a step over the one before
    vocabulary: int = 4096  # tokens that a head learns to tell apart: those the target writes most often
    proposed: int = 4096  # of these, that it proposes
    layers: int = 1  # decoder layers of the draft

    @classmethod
    def quick(cls, kind: Kind, seed: int) -> Recipe:
        """Return a recipe that two CPU cores finish in under half an hour."""
        return cls(kind=kind, seed=seed, tokens=120_000, epochs=3)
