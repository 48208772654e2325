"""Counters of an engine since its start, and what it holds now: for the dashboard and for metrics.

Costs a few additions per step, none per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.stats import StepBatch


@dataclass(slots=True)
class WorkerStats:
    """Sums over all steps since the process started."""

    steps: Counter[str] = field(default_factory=Counter)  # by decision
    batch_sequences: int = 0  # summed over the steps, as are all below
    tokens: int = 0
    tree_nodes: int = 0
    accepted_tokens: int = 0
    expected_accepted: float = 0.0
    preemptions: int = 0
    recomputed_tokens: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    step_ms: float = 0.0
    joules: float = 0.0  # 0 without an energy meter

    def take(self, results: StepBatch) -> None:
        """Add the results of a step."""
        if not len(results):
            return
        self.steps[results.decision] += 1
        self.batch_sequences += len(results)
        self.draft_ms += results.draft_ms
        self.verify_ms += results.verify_ms
        self.step_ms += float(results.step_ms.min())  # after a prefill, they include its time
        self.tokens += len(results.tokens)
        self.tree_nodes += int(results.tree_nodes.sum())
        self.accepted_tokens += int(results.accepted_tokens.sum())
        self.expected_accepted += float(results.expected_accepted.sum())
        self.preemptions += int(results.preemptions.sum())
        self.recomputed_tokens += int(results.recomputed_tokens.sum())

    def as_json(self, held: Collection[EngineSequence]) -> dict[str, Any]:
        """Return the sums and what the engine holds now."""
        decoding = [sequence for sequence in held if sequence.slot >= 0]
        return {
            "sequences": len(decoding),
            "waiting_sequences": len(held) - len(decoding),
            "kv_tokens": sum(sequence.cached for sequence in decoding),
            "steps": dict(self.steps),
            "batch_sequences": self.batch_sequences,
            "tokens": self.tokens,
            "tree_nodes": self.tree_nodes,
            "accepted_tokens": self.accepted_tokens,
            "expected_accepted": round(self.expected_accepted, 3),
            "preemptions": self.preemptions,
            "recomputed_tokens": self.recomputed_tokens,
            "draft_ms": round(self.draft_ms, 1),
            "verify_ms": round(self.verify_ms, 1),
            "step_ms": round(self.step_ms, 1),
        }
