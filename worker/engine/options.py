"""Options of the engine, fixed when it is built."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_STEP_NODES = 256  # draft nodes of one step, all trees together
MAX_BLOCK_DEPTH = 16  # tokens that a block drafter foresees


class Mode(StrEnum):
    """How the engine chooses its draft trees."""

    PLAIN = "plain"  # no drafts: one token per sequence and step
    PAPER = "paper"  # OPT-Tree (arXiv 2406.17276) as published: the same budget, threshold and depth per tree
    OPT_TREE = "opt-tree"  # its objective with one measured price of time for the batch; may choose no tree at all


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Mode and limits of one engine, and parameters of its draft trees."""

    mode: Mode = Mode.OPT_TREE
    max_sequences: int = 16  # sequences decoded together; one KV slot each
    max_context: int = 4096  # tokens of prompt and completion together
    prefill_rows: int = 512  # prompt tokens that one step may carry
    kv_tokens: int | None = None  # KV entries of all sequences together; None: enough to fill every slot
    page_tokens: int = 1  # KV entries that are allocated at once
    nodes: int = 60  # n: max nodes of one draft tree
    threshold: float = 0.5  # delta of paper mode: growth ends at the first layer that adds no more to E(A)
    max_depth: int = 10  # max layers of one draft tree
    calibrated: bool = False  # paper mode: use the acceptance model, as opt-tree always does
    forced_tokens: bool = True  # tokens that a grammar forces become draft nodes, but in plain mode
    probe_every: int = 64  # opt-tree: about one step in this many is plain, to measure the speed-up

    @property
    def slot_tokens(self) -> int:
        """KV entries of one slot: a full context and one tree."""
        return self.max_context + self.nodes + 1

    @property
    def draft_slot_tokens(self) -> int:
        """KV entries of one slot of a draft model: a full context, and every node that it expands in a step."""
        return self.max_context + self.nodes * self.max_depth

    @property
    def draft_kv_tokens(self) -> int:
        """KV entries of all sequences of a draft model together: their tokens, and the nodes that one step expands."""
        return self.total_kv_tokens + MAX_STEP_NODES * (self.max_depth - 1)

    @property
    def total_kv_tokens(self) -> int:
        """KV entries of all sequences together."""
        return self.max_sequences * self.slot_tokens if self.kv_tokens is None else self.kv_tokens
