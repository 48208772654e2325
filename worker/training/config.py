"""The training recipe: every hyperparameter of a draft. The draft's card records it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The kind of draft to train."""

    HEAD = "head"  # a small network over the target's hidden states; can't run without the target
    BLOCK = "block"  # the same, with all depths of a tree in one forward
    MODEL = "model"  # a small language model


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of a training. The same recipe and seed on the same machine give the same weights."""

    kind: Kind = Kind.HEAD
    seed: int = 0
    tokens: int = 600_000  # of training text that the target writes, without prompts
    answer_tokens: int = 224  # maximum of one answer
    greedy_share: float = 0.7  # of the answers; the others are sampled at temperature 1
    held_out: int = 32  # texts for evaluation, not trained on
    epochs: int = 3  # maximum
    rows: int = 8  # texts per batch and process
    learning_rate: float = 1e-3
    unroll: int = 3  # steps of EAGLE-3's training-time test: depths the draft is trained to predict
    unroll_decay: float = 0.8  # loss weight of an unroll step relative to the step before
    vocabulary: int = 4096  # size of a head's training vocabulary: the target's most frequent tokens
    proposed: int = 4096  # size of the part of it that the head may propose
    layers: int = 1  # decoder layers of the draft
    depth: int = 6  # of a block: tokens that it foresees
    rank: int = 128  # width of a block's path head
    roots: int = 96  # of a block: roots per text and epoch
    start: str = ""  # directory of a head of the same target whose weights a block starts with; empty: random
    start_rate: float = 0.3  # learning rate of these weights, relative to that of the new ones

    @classmethod
    def quick(cls, kind: Kind, seed: int) -> Recipe:
        """Return a recipe that two CPU cores finish in under half an hour."""
        return cls(kind=kind, seed=seed, tokens=120_000, epochs=3)
