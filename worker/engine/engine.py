"""The engine: schedule, draft, verify, compact, emit. One call of `step` runs one forward of the target.

It takes and returns token ids: it knows no text, Redis, SQL or environment. Without a drafter it decodes plainly, which
is the reference of the tests and the baseline of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from time import perf_counter
from typing import Any

import numpy as np

from worker.engine.batch import Batch
from worker.engine.errors import NanLogits
from worker.engine.logprobs import Logprobs, compute_logprobs
from worker.engine.model.packed_model import LanguageModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.scheduler import Scheduler
from worker.engine.segments import IntArray, KvMove
from worker.engine.sequence import Sequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.planner import Planner, StepPlan, StepTimes
from worker.engine.speculation.state import SpeculationState
from worker.engine.speculation.verifier import AcceptedPath, walk
from worker.engine.stats import REASONS, StepBatch, TracedTree


class Engine:
    """Decodes many sequences together. Each gets the text that it would get alone."""

    def __init__(
        self,
        target: LanguageModel,
        drafter: Drafter | None,
        options: EngineOptions,
        costs: CostModel | None = None,
        state: SpeculationState | None = None,
        *,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Build an engine. Opt-tree mode needs `costs`; plain mode ignores `drafter`.

        `state` is what an earlier engine with the same drafter has learned; this one continues from it. `clock` returns
        seconds, and is the only clock that the engine reads.
        """
        assert options.mode is not Mode.OPT_TREE or costs is not None, "opt-tree mode needs a cost model"
        self._target = target
        self._drafter = None if options.mode is Mode.PLAIN else drafter
        self._options = options
        self._state = state or SpeculationState()
        self._clock = clock
        self._planner = Planner(options, self._drafter, costs, self._state, clock)
        self._scheduler = Scheduler(options)
        target.clear()  # of the sequences of an earlier engine
        self._late_ms = 0.0  # time of the previous step after it was measured

    @property
    def free_capacity(self) -> int:
        """Number of sequences that would be admitted at once."""
        return self._scheduler.free_capacity

    @property
    def free_slots(self) -> int:
        """Number of KV slots without a sequence."""
        return self._scheduler.slots.free_slots

    def forget(self, slot: int) -> None:
        """Drop the cached prefix of a free slot, because its KV entries were overwritten."""
        self._scheduler.slots.drop_prefix(slot)

    @property
    def learned(self) -> dict[str, Any]:
        """What the engine has learned about drafts, as JSON."""
        return self._state.as_json()

    @property
    def busy(self) -> bool:
        """True while some sequence is not finished."""
        return self._scheduler.busy

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, new or resumed. It must be shorter than the context by one token at least."""
        assert len(sequence.ids) < self._options.max_context, "the sequence fills the context: no token can be added"
        self._scheduler.add(sequence)

    def cancel(self, keys: set[Hashable]) -> None:
        """End sequences by key, without another token."""
        sequences = self._scheduler.of(keys)
        for sequence in sequences:
            sequence.cancelled = True
        self._drop_finished(sequences)

    def step(self, only: Collection[Hashable] | None = None, *, plain: bool = False) -> StepBatch:
        """Run one step and return what each emitting sequence got: nothing while prompts are still being read.

        The step is of all sequences, or of those whose keys are in `only`. A `plain` step uses no drafts. Raises
        NanLogits, before any sequence has changed, if no token can be drawn for some of them.
        """
        timer = _StepTimer(self._clock, self._late_ms)
        batch = self._scheduler.next_batch(only, plain=plain)
        if batch.empty:
            return StepBatch.empty()
        for slot in batch.evicted:
            self._target.truncate(slot, 0)
        for copy in batch.prefix_copies:
            self._target.copy_prefix(copy.source, copy.target, copy.length)
        plan = self._planner.plan(batch)
        timer.drafted()
        segments, rows = batch.pack(plan.selected)
        logits = self._target.forward(segments)
        accepted = walk(plan.selected, logits, rows)
        undrawn = [s for s, path in zip(plan.selected.sequences, accepted, strict=True) if path.bonus < 0]
        if undrawn:
            raise NanLogits(undrawn)
        timer.verified()
        emitted = [self._emit(plan.selected, tree, path) for tree, path in enumerate(accepted)]
        logprobs = compute_logprobs(plan.selected, logits, rows, accepted, emitted)
        self._commit(plan, accepted, emitted)
        results = self._results(batch, plan, accepted, emitted, logprobs, timer)
        self._drop_finished(plan.selected.sequences)
        self._late_ms = timer.late_ms()
        return results

    @staticmethod
    def _emit(selected: Forest, tree: int, accepted: AcceptedPath) -> list[int]:
        return selected.sequences[tree].emit([*selected.token[accepted.path].tolist(), accepted.bonus])

    def _commit(self, plan: StepPlan, accepted: list[AcceptedPath], emitted: list[list[int]]) -> None:
        """Compact the accepted paths in the target's KV, and let the drafter do the same."""
        moves: list[KvMove] = []
        for tree, sequence in enumerate(plan.selected.sequences):
            path = accepted[tree].path
            if len(path):
                root = len(sequence.ids) - len(emitted[tree]) - 1  # KV index
                offsets = np.searchsorted(plan.selected.nodes_of(tree), path)
                moves.append(KvMove(sequence.slot, root + 1, root + offsets))
            sequence.cached = len(sequence.ids) - 1
            if self._drafter is not None and plan.layers:  # without layers it has no tree, and it catches up lazily
                self._drafter.commit(plan.drafted, tree, plan.nodes[path], emitted[tree])
        self._target.compact(moves)

    def _results(
        self,
        batch: Batch,
        plan: StepPlan,
        accepted: list[AcceptedPath],
        emitted: list[list[int]],
        logprobs: list[Logprobs],
        timer: _StepTimer,
    ) -> StepBatch:
        """Let the planner learn from the step, and return each sequence's part of it."""
        step_ms = timer.step_ms()
        times = StepTimes(timer.verify_ms, step_ms)
        plain_step_ms = self._planner.learn(batch, plan, accepted, sum(map(len, emitted)), times)
        selected, sequences = plan.selected, plan.selected.sequences
        trees = len(sequences)
        nodes = np.bincount(selected.tree, minlength=trees) - 1
        depths = np.zeros(trees, np.int64)
        np.maximum.at(depths, selected.tree, selected.depth)
        siblings = selected.siblings()
        reached = [
            _drawn_ranks(tree, accepted[tree].path, len(emitted[tree]), *siblings) if nodes[tree] else []
            for tree in range(trees)
        ]
        results = StepBatch(
            numbers=np.array([s.number for s in sequences], np.int64),
            counts=np.array([len(tokens) for tokens in emitted], np.int64),
            tokens=np.array([token for tokens in emitted for token in tokens], np.int64),
            reasons=np.array([REASONS.index(s.finish_reason) for s in sequences], np.int64),
            steps=np.array([s.steps for s in sequences], np.int64),
            tree_nodes=nodes,
            tree_depths=depths,
            accepted_tokens=np.array(
                [min(len(one.path), len(tokens)) for one, tokens in zip(accepted, emitted, strict=True)], np.int64
            ),
            expected_accepted=selected.expected(np.ones(selected.size, np.bool_)),
            step_ms=step_ms + np.array([s.prefill_ms for s in sequences]),
            reached_counts=np.array([len(some) for some in reached], np.int64),
            reached=np.array([entry for some in reached for entry in some], np.int64).reshape(-1, 2),
            draft_ms=timer.draft_ms,
            verify_ms=timer.verify_ms,
            plain_step_ms=plain_step_ms,
            drafter=plan.strategy.drafter.name if plan.strategy else None,
            decision=plan.decision,
            trees={
                tree: _traced_tree(selected, tree, accepted[tree])
                for tree, s in enumerate(sequences)
                if s.steps < s.traced_steps
            },
            logprobs={tree: some for tree, some in enumerate(logprobs) if some is not None},
        )
        for sequence in sequences:
            sequence.steps += 1
            sequence.prefill_ms = 0.0
        for chunk in batch.chunks:
            if not chunk.completes:
                chunk.sequence.cached = chunk.end
                chunk.sequence.prefill_ms += step_ms
        return results

    def _drop_finished(self, candidates: Iterable[Sequence]) -> None:
        for sequence in self._scheduler.drop_finished(candidates):
            # Release the tree; keep the KV entries that stay cached for later sequences with this prefix.
            self._target.truncate(sequence.slot, self._scheduler.slots.cached_length(sequence.slot))
            if self._drafter is not None:
                self._drafter.drop(sequence)


def _drawn_ranks(root: int, path: IntArray, emitted: int, rank: IntArray, children: IntArray) -> list[tuple[int, int]]:
    """Return (number of children, rank of the drawn child) of the root and of each accepted node that has children.

    Rank -1: the target drew no child. Leave out draws that were cut off at the end of the sequence.
    """
    drawn = [*rank[path].tolist(), -1]
    counts = children[[root, *path.tolist()]].tolist()
    reached = len(drawn) if emitted >= len(path) else emitted
    return [(count, one) for count, one in zip(counts[:reached], drawn[:reached], strict=True) if count]


def _traced_tree(selected: Forest, tree: int, accepted: AcceptedPath) -> TracedTree:
    nodes = selected.nodes_of(tree)
    parents = selected.parent[nodes]
    return TracedTree(
        parents=tuple(np.where(parents < 0, -1, np.searchsorted(nodes, parents)).tolist()),
        tokens=tuple(selected.token[nodes].tolist()),
        values=tuple(selected.value[nodes].tolist()),
        accepted=tuple(np.isin(nodes, [nodes[0], *accepted.path]).tolist()),
        bonus=accepted.bonus,
    )


class _StepTimer:
    """Wall times of one step, in ms.

    What a step does after it was measured (dropping finished sequences) counts in the next one as `late_ms`.
    """

    def __init__(self, clock: Callable[[], float], late_ms: float) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._late_ms = late_ms
        self._step_ms = 0.0
        self.draft_ms = 0.0
        self.verify_ms = 0.0

    def drafted(self) -> None:
        self.draft_ms = self._lap()

    def verified(self) -> None:
        self.verify_ms = self._lap()

    def step_ms(self) -> float:
        self._step_ms = (self._clock() - self._started) * 1e3
        return self._late_ms + self._step_ms

    def late_ms(self) -> float:
        return (self._clock() - self._started) * 1e3 - self._step_ms

    def _lap(self) -> float:
        now = self._clock()
        lap, self._last = (now - self._last) * 1e3, now
        return lap
