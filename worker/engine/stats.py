"""Statistics and results of a step. The engine returns them; the worker stores them."""

from __future__ import annotations

from dataclasses import dataclass

from worker.engine.logprobs import Logprobs
from worker.engine.sequence import Sequence
from worker.engine.speculation.regret_guard import Decision

# For each node that the target reached and that has drafted children: (number of children, rank of the child that it
# drew). Rank 0 is the most likely child; None: it drew none of them.
DrawnRanks = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, slots=True)
class StepStats:
    """One sequence's part of one decoding step."""

    step: int  # 0 is the token from prefill
    tree_nodes: int  # draft nodes that the target verified, without the root
    tree_depth: int
    accepted_tokens: int  # accepted draft tokens, without the target's own token
    emitted_tokens: int
    expected_accepted: float  # E(A) of the tree (OPT-Tree, arXiv 2406.17276)
    draft_ms: float  # time of drafting for the whole batch; the next two are of the whole batch, too
    verify_ms: float
    step_ms: float
    batch_sequences: int  # sequences that emitted in the step
    drafter: str | None  # None: no drafts were verified
    plain_step_ms: float | None  # estimated time of the step without drafts; None: it shared a prefill
    decision: Decision  # of the whole batch
    reached: DrawnRanks | None = None  # None: no drafts were verified


@dataclass(frozen=True, slots=True)
class TracedTree:
    """The draft tree of one sequence and step as verified, for display. Root first, parents before children."""

    parents: tuple[int, ...]  # -1: the root, the newest committed token
    tokens: tuple[int, ...]
    values: tuple[float, ...]  # estimated P(the target reaches and accepts the node); 1 for the root
    accepted: tuple[bool, ...]  # True for the root
    bonus: int  # the target's own token after the accepted path


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one sequence got from a step."""

    sequence: Sequence
    tokens: tuple[int, ...]  # emitted tokens: the first `stats.accepted_tokens` are accepted draft tokens
    stats: StepStats
    tree: TracedTree | None = None  # only of the first `traced_steps` steps
    logprobs: Logprobs = None  # of each token, if requested
