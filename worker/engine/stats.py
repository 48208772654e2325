"""Statistics and results of a step. The engine returns them; the worker stores them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from worker.engine.segments import IntArray
from worker.engine.sequence import FinishReason
from worker.engine.speculation.decision import Decision
from worker.engine.token_logprobs import Logprobs

if TYPE_CHECKING:
    from worker.engine.host.nodes import FloatArray

REASONS: tuple[FinishReason | None, ...] = (None, *FinishReason)  # by their code in a `StepBatch`

GRAMMAR_SOURCE = "grammar"  # in `StepStats.drafter`: tokens that a grammar forces

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
    preemptions: int = 0  # how often the sequence lost its KV memory since its last token
    recomputed_tokens: int = 0  # tokens prefilled again for that


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

    number: int  # of the sequence
    tokens: tuple[int, ...]  # emitted tokens: the first `stats.accepted_tokens` are accepted draft tokens
    finish_reason: FinishReason | None  # None: the sequence has not ended
    stats: StepStats
    tree: TracedTree | None = None  # only of the first `traced_steps` steps
    logprobs: Logprobs = None  # of each token, if requested
    prompt_logprobs: Logprobs = None  # of the prompt's tokens but the first, if requested, when it has been read


@dataclass(frozen=True, slots=True)
class EmittedTokens:
    """The tokens of one step, sequence after sequence."""

    counts: IntArray  # [sequences]
    tokens: IntArray  # [sum of counts]
    reasons: IntArray  # [sequences] finish reasons: an index of `REASONS`

    def lists(self) -> list[list[int]]:
        """Return the tokens of each sequence."""
        tokens, ends = self.tokens.tolist(), self.counts.cumsum().tolist()
        return [tokens[end - count : end] for end, count in zip(ends, self.counts.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What all emitting sequences got from one step, as columns: cheap to build, and to send to another process.

    [n] has an entry for each sequence. Names and units are those of `StepStats`. Iterate for one result at a time.
    """

    numbers: IntArray  # [n]
    counts: IntArray  # [n] emitted tokens
    tokens: IntArray  # [sum of counts] in the order of `numbers`
    reasons: IntArray  # [n] finish reasons: an index of `REASONS`
    steps: IntArray  # [n]
    preemptions: IntArray  # [n] how often the sequence lost its KV memory since its last token
    recomputed_tokens: IntArray  # [n] tokens prefilled again for that
    tree_nodes: IntArray  # [n]
    forced_nodes: IntArray  # [n] nodes of the tree that a grammar forces; the drafter proposed the others
    tree_depths: IntArray  # [n]
    accepted_tokens: IntArray  # [n]
    expected_accepted: FloatArray  # [n]
    step_ms: FloatArray  # [n]
    reached_counts: IntArray  # [n] entries of `reached`
    reached: IntArray  # [sum of reached_counts, 2] `DrawnRanks`; rank -1: none of the children
    draft_ms: float
    verify_ms: float
    plain_step_ms: float | None
    drafter: str | None  # of the sequences with a tree
    decision: Decision
    trees: Mapping[int, TracedTree]  # by index of the sequence in `numbers`, as are the next two
    logprobs: Mapping[int, Logprobs]
    prompt_logprobs: Mapping[int, Logprobs]

    @classmethod
    def empty(cls) -> Self:
        """Return the result of a step in which no sequence emitted."""
        ints, floats = np.empty(0, np.int64), np.empty(0)
        return cls(
            numbers=ints,
            counts=ints,
            tokens=ints,
            reasons=ints,
            steps=ints,
            preemptions=ints,
            recomputed_tokens=ints,
            tree_nodes=ints,
            forced_nodes=ints,
            tree_depths=ints,
            accepted_tokens=ints,
            expected_accepted=floats,
            step_ms=floats,
            reached_counts=ints,
            reached=ints.reshape(0, 2),
            draft_ms=0.0,
            verify_ms=0.0,
            plain_step_ms=None,
            drafter=None,
            decision=Decision.PREFILL,
            trees={},
            logprobs={},
            prompt_logprobs={},
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all columns as two pieces: pickling an array takes longer than copying it."""
        ints = np.concatenate([*(getattr(self, name) for name in _INTS), self.tokens, self.reached.ravel()])
        floats = np.concatenate([getattr(self, name) for name in _FLOATS])
        others = (*(getattr(self, name) for name in _OTHERS), self.decision.value)  # a member of an enum takes longer
        return _restored, (len(self), len(self.tokens), ints.tobytes(), floats.tobytes(), others)

    def __len__(self) -> int:
        """Return the number of emitting sequences."""
        return len(self.numbers)

    @property
    def finished(self) -> IntArray:
        """Numbers of the sequences that end with this step."""
        ended: IntArray = self.numbers[self.reasons != 0]
        return ended

    def __iter__(self) -> Iterator[StepResult]:
        """Yield the result of each sequence."""
        tokens, reached = self.tokens.tolist(), [_drawn(*entry) for entry in self.reached.tolist()]
        starts, reached_starts = (counts.cumsum() - counts for counts in (self.counts, self.reached_counts))
        per_sequence = (self.numbers, starts, self.reasons, reached_starts, self.reached_counts)
        rows = zip(self._stats(), *(column.tolist() for column in per_sequence), strict=True)
        for index, (stats, number, start, reason, first, count) in enumerate(rows):
            yield StepResult(
                number=number,
                tokens=tuple(tokens[start : start + stats.emitted_tokens]),
                finish_reason=REASONS[reason],
                stats=replace(stats, reached=tuple(reached[first : first + count])) if stats.tree_nodes else stats,
                tree=self.trees.get(index),
                logprobs=self.logprobs.get(index),
                prompt_logprobs=self.prompt_logprobs.get(index),
            )

    def _stats(self) -> Iterator[StepStats]:
        """Yield the statistics of each sequence, but for what the target drew."""
        columns = (
            self.steps,
            self.tree_nodes,
            self.forced_nodes,
            self.tree_depths,
            self.accepted_tokens,
            self.counts,
            self.expected_accepted,
            self.step_ms,
            self.preemptions,
            self.recomputed_tokens,
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for step, nodes, forced, depth, accepted, emitted, expected, step_ms, preemptions, recomputed in rows:
            yield StepStats(
                step=step,
                tree_nodes=nodes,
                tree_depth=depth,
                accepted_tokens=accepted,
                emitted_tokens=emitted,
                expected_accepted=expected,
                draft_ms=self.draft_ms,
                verify_ms=self.verify_ms,
                step_ms=step_ms,
                batch_sequences=len(self.numbers),
                drafter=_source(self.drafter, nodes, forced),
                plain_step_ms=self.plain_step_ms,
                decision=self.decision,
                preemptions=preemptions,
                recomputed_tokens=recomputed,
            )


def _source(drafter: str | None, nodes: int, forced: int) -> str | None:
    """Return who proposed the nodes of a tree; None: it has none."""
    sources = [drafter if nodes > forced else None, GRAMMAR_SOURCE if forced else None]
    return "+".join(source for source in sources if source) or None


# Names of the columns with an entry for each sequence, and of what is no array.
_INTS = (
    "numbers",
    "counts",
    "reasons",
    "steps",
    "preemptions",
    "recomputed_tokens",
    "tree_nodes",
    "forced_nodes",
    "tree_depths",
    "accepted_tokens",
    "reached_counts",
)
_FLOATS = ("expected_accepted", "step_ms")
_OTHERS = ("draft_ms", "verify_ms", "plain_step_ms", "drafter", "trees", "logprobs", "prompt_logprobs")


def _restored(count: int, tokens: int, ints: bytes, floats: bytes, others: tuple[Any, ...]) -> StepBatch:
    """Return the batch that was pickled; its arrays are read-only."""
    columns = np.frombuffer(ints, np.int64)
    first = count * len(_INTS)
    *values, decision = others
    given: dict[str, Any] = dict(zip(_OTHERS, values, strict=True)) | {"decision": Decision(decision)}
    given |= zip(_INTS, columns[:first].reshape(len(_INTS), count), strict=True)
    given |= zip(_FLOATS, np.frombuffer(floats, np.float64).reshape(len(_FLOATS), count), strict=True)
    return StepBatch(tokens=columns[first : first + tokens], reached=columns[first + tokens :].reshape(-1, 2), **given)


def _drawn(children: int, rank: int) -> tuple[int, int | None]:
    return children, None if rank < 0 else rank
