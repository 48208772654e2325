"""The dials of the engine, set once when it is built."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_STEP_NODES = 256  # draft nodes of a step at most, of all trees together


class Mode(StrEnum):
    """How the engine chooses its draft trees."""

    PLAIN = "plain"  # no draft: one token per sequence and step
    PAPER = "paper"  # OPT-Tree as published: fixed node budget, threshold and depth for every sequence
    OPT_TREE = "opt-tree"  # the same objective under one measured price for the whole batch; may choose no tree at all


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Limits and constants of one engine."""

    mode: Mode = Mode.OPT_TREE
    max_sequences: int = 16  # sequences decoded together; one KV slot each
    max_context: int = 4096  # tokens of prompt and completion together
    prefill_rows: int = 512  # prompt tokens that one step may carry
    kv_tokens: int | None = None  # tokens of KV memory for all sequences together; None: every slot in full
    nodes: int = 60  # n: nodes of one draft tree at most
    threshold: float = 0.5  # delta of paper mode: a layer must add more expected acceptance than this
    max_depth: int = 10  # layers of one draft tree at most
    calibrated: bool = False  # paper mode: value nodes by learned acceptance, as opt-tree always does
    probe_every: int = 64  # opt-tree: about one step in so many runs plain, to keep the measured speed-up honest

    @property
    def slot_tokens(self) -> int:
        """KV entries of one slot: a full context and one tree."""
        return self.max_context + self.nodes + 1

    @property
    def draft_slot_tokens(self) -> int:
        """KV entries of one slot of a draft model: a full context, and every node it expands until the walk."""
        return self.max_context + self.nodes * self.max_depth

    @property
    def draft_kv_tokens(self) -> int:
        """KV entries of all sequences of a draft model together: their texts, and beside them their trees."""
        return self.total_kv_tokens + self.max_sequences * self.nodes * (self.max_depth - 1)

    @property
    def total_kv_tokens(self) -> int:
        """KV entries of all sequences together."""
        return self.max_sequences * self.slot_tokens if self.kv_tokens is None else self.kv_tokens
