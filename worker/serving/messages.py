"""Messages between the engine and the request loop. Plain data: it is pickled on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.engine.logprobs import Logprobs
from worker.engine.sequence import FinishReason
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.regret_guard import Decision
from worker.engine.stats import DrawnRanks, StepResult, StepStats, TracedTree

_REASONS = (None, *FinishReason)  # by code


@dataclass(frozen=True, slots=True)
class AddSequences:
    """To the engine: decode these sequences. Each has a number, which is never used again."""

    sequences: tuple[tuple[int, EngineSequence], ...]


@dataclass(frozen=True, slots=True)
class CancelSequences:
    """To the engine: end these sequences without another token; unknown numbers are ignored."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReportsRead:
    """To the engine: so many reports have been read. It holds back when too many are not."""

    count: int


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What one sequence got from a step."""

    number: int
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None  # None: the engine goes on with it
    stats: StepStats
    tree: TracedTree | None
    logprobs: Logprobs


@dataclass(frozen=True, slots=True)
class StepResults:
    """The results of one step, as columns: one entry for each of `n` sequences, or one for all of them."""

    numbers: NDArray[np.int64]  # [n]
    counts: NDArray[np.int64]  # [n] emitted tokens
    tokens: NDArray[np.int64]  # [sum of counts], in the order of `numbers`
    reasons: NDArray[np.int8]  # [n] index of `_REASONS`
    steps: NDArray[np.int64]  # [n], as are the next five; names and units are those of StepStats
    tree_nodes: NDArray[np.int64]
    tree_depths: NDArray[np.int64]
    accepted_tokens: NDArray[np.int64]
    expected_accepted: NDArray[np.float64]
    step_ms: NDArray[np.float64]
    draft_ms: float
    verify_ms: float
    plain_step_ms: float | None
    drafter: str | None  # of the sequences with a tree
    decision: Decision
    reached: Mapping[int, DrawnRanks]  # by position in `numbers`, as are the next two
    trees: Mapping[int, TracedTree]
    logprobs: Mapping[int, Logprobs]

    @classmethod
    def pack(cls, results: Sequence[StepResult], numbers: Sequence[int]) -> StepResults:
        """Return the results of a step, one at least; `numbers` are those of their sequences."""
        stats = [result.stats for result in results]
        first = stats[0]
        return cls(
            numbers=np.array(numbers),
            counts=np.array([len(result.tokens) for result in results]),
            tokens=np.array([token for result in results for token in result.tokens], np.int64),
            reasons=np.array([_REASONS.index(result.sequence.finish_reason) for result in results], np.int8),
            steps=np.array([s.step for s in stats]),
            tree_nodes=np.array([s.tree_nodes for s in stats]),
            tree_depths=np.array([s.tree_depth for s in stats]),
            accepted_tokens=np.array([s.accepted_tokens for s in stats]),
            expected_accepted=np.array([s.expected_accepted for s in stats]),
            step_ms=np.array([s.step_ms for s in stats]),
            draft_ms=first.draft_ms,
            verify_ms=first.verify_ms,
            plain_step_ms=first.plain_step_ms,
            drafter=next((s.drafter for s in stats if s.drafter is not None), None),
            decision=first.decision,
            reached={i: s.reached for i, s in enumerate(stats) if s.reached is not None},
            trees={i: result.tree for i, result in enumerate(results) if result.tree is not None},
            logprobs={i: result.logprobs for i, result in enumerate(results) if result.logprobs is not None},
        )

    def __iter__(self) -> Iterator[SequenceResult]:
        """Yield the result of each sequence."""
        columns = (
            self.numbers,
            self.counts,
            self.reasons,
            self.steps,
            self.tree_nodes,
            self.tree_depths,
            self.accepted_tokens,
            self.expected_accepted,
            self.step_ms,
        )
        tokens, end = self.tokens.tolist(), 0
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for i, (number, count, reason, step, nodes, depth, accepted, expected, step_ms) in enumerate(rows):
            end += count
            yield SequenceResult(
                number=number,
                tokens=tuple(tokens[end - count : end]),
                finish_reason=_REASONS[reason],
                stats=StepStats(
                    step=step,
                    tree_nodes=nodes,
                    tree_depth=depth,
                    accepted_tokens=accepted,
                    emitted_tokens=count,
                    expected_accepted=expected,
                    draft_ms=self.draft_ms,
                    verify_ms=self.verify_ms,
                    step_ms=step_ms,
                    batch_sequences=len(self.numbers),
                    drafter=self.drafter if nodes else None,
                    plain_step_ms=self.plain_step_ms,
                    decision=self.decision,
                    reached=self.reached.get(i),
                ),
                tree=self.trees.get(i),
                logprobs=self.logprobs.get(i),
            )


@dataclass(frozen=True, slots=True)
class EngineReport:
    """From the engine: what it can take and what it has done. Each report proves that it has not hung."""

    num_added: int  # sequences that it has got so far
    free_capacity: int  # sequences that it can take beside them
    ended_at: float  # Unix seconds
    notified: bool = False  # new work may be waiting in the database
    results: StepResults | None = None
    given_up: tuple[tuple[int, str], ...] = ()  # number and reason of sequences that it can't decode


ToEngine = AddSequences | CancelSequences | ReportsRead
ToRequests = EngineReport
