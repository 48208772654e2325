"""The numbers of a step, as data. The engine returns them; others store and print them."""

from __future__ import annotations

from dataclasses import dataclass

from worker.engine.logprobs import Logprobs
from worker.engine.sequence import Sequence
from worker.engine.speculation.regret_guard import Decision

# Per node that the target reached and that had drafts below it: how many, and the rank of the one it drew, 0 being the
# likeliest (None: none of them).
Reached = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one sequence's share of one decoding step was."""

    step: int  # 0 is the token from prefill
    tree_nodes: int  # draft nodes shown to the target, root not counted
    tree_depth: int
    accepted_tokens: int  # draft tokens kept; the target's own token is not one of them
    emitted_tokens: int
    expected_accepted: float  # E(A) of the tree
    draft_ms: float  # of the whole batch, as are the next two
    verify_ms: float
    step_ms: float
    batch_sequences: int  # sequences that emitted in the step
    drafter: str | None  # None: the sequence showed no drafts
    plain_step_ms: float | None  # time of the step without drafts, as measured; None: the step shared a prefill
    decision: Decision  # what the whole batch did, and why
    reached: Reached | None = None  # None: the sequence showed no drafts


@dataclass(frozen=True, slots=True)
class TracedTree:
    """The draft tree that one sequence showed in a step, and what the target kept of it. Root first, parents first."""

    parents: tuple[int, ...]  # -1: the root, the newest committed token
    tokens: tuple[int, ...]
    values: tuple[float, ...]  # P(the target reaches the node and accepts it), as expected; the root's is 1
    accepted: tuple[bool, ...]  # the root is
    bonus: int  # the target's own token behind the accepted path


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one sequence got from a step."""

    sequence: Sequence
    tokens: tuple[int, ...]  # emitted; the first `stats.accepted_tokens` are accepted draft tokens
    stats: StepStats
    tree: TracedTree | None = None  # if the sequence is traced that far
    logprobs: Logprobs = None  # of each token, if the sequence wants them
