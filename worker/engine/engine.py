"""The engine: schedule, draft, verify, keep, commit. One call of `step` is one forward of the target.

Token ids in, token ids out: no text, no Redis, no SQL, no environment. Without a drafter this is plain decoding, the
truth that tests compare with and the baseline that benchmarks measure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
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
from worker.engine.stats import Reached, StepResult, StepStats, TracedTree


class Engine:
    """Decodes many sequences together, each exactly as if it were alone."""

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
        """Build an engine. Opt-tree mode needs `costs`, and a drafter is of no use in plain mode.

        Learning continues from `state`, that of an earlier engine with such a drafter. `clock` returns seconds;
        every time that the engine measures is read from it.
        """
        assert options.mode is not Mode.OPT_TREE or costs is not None, "opt-tree mode prices trees with a cost model"
        self._target = target
        self._drafter = None if options.mode is Mode.PLAIN else drafter
        self._options = options
        self._state = state or SpeculationState()
        self._clock = clock
        self._planner = Planner(options, self._drafter, costs, self._state, clock)
        self._scheduler = Scheduler(options)
        target.clear()  # of an earlier engine's texts
        self._late_ms = 0.0  # of the step before, behind its last look at the clock

    @property
    def free_capacity(self) -> int:
        """Sequences that can be added and admitted at once."""
        return self._scheduler.free_capacity

    @property
    def free_slots(self) -> int:
        """KV slots that nobody holds."""
        return self._scheduler.slots.free_slots

    def forget(self, slot: int) -> None:
        """Share nothing more of what a free slot holds: somebody has written over it."""
        self._scheduler.slots.drop_prefix(slot)

    @property
    def learned(self) -> dict[str, Any]:
        """What the engine has learned about drafts, as JSON."""
        return self._state.as_json()

    @property
    def busy(self) -> bool:
        """True while some sequence has not ended."""
        return bool(self._scheduler.sequences)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, fresh or resumed; its ids leave room for one new token."""
        assert len(sequence.ids) < self._options.max_context, "the sequence leaves no room for one new token"
        self._scheduler.add(sequence)

    def cancel(self, keys: set[Hashable]) -> None:
        """End sequences by key, without another token."""
        for sequence in self._scheduler.sequences:
            if sequence.key in keys:
                sequence.cancelled = True
        self._drop_finished()

    def step(self, only: Collection[Hashable] | None = None, *, plain: bool = False) -> list[StepResult]:
        """Run one step and return what each emitting sequence got; nothing while a prompt is still being read.

        Raises NanLogits, before any text has changed, if nothing can be drawn for some of them.
        It is a step of all sequences or of `only` those with these keys; a `plain` one does without drafts.
        """
        timer = _StepTimer(self._clock, self._late_ms)
        batch = self._scheduler.next_batch(only, plain=plain)
        if batch.empty:
            return []
        for slot in batch.evicted:
            self._target.truncate(slot, 0)
        for share in batch.shares:
            self._target.copy_prefix(share.source, share.target, share.length)
        plan = self._planner.plan(batch)
        timer.drafted()
        segments, rows = batch.pack(plan.shown)
        logits = self._target.forward(segments)
        accepted = walk(plan.shown, logits, rows)
        undrawn = [s for s, kept in zip(plan.shown.sequences, accepted, strict=True) if kept.bonus < 0]
        if undrawn:
            raise NanLogits(undrawn)
        timer.verified()
        kept = [self._emit(plan.shown, tree, accepted[tree]) for tree in range(len(plan.shown.sequences))]
        told = compute_logprobs(plan.shown, logits, rows, accepted, kept)
        self._keep(plan, accepted, kept)
        results = self._number(batch, plan, accepted, kept, told, timer)
        self._drop_finished()
        self._late_ms = timer.late_ms()
        return results

    @staticmethod
    def _emit(shown: Forest, tree: int, accepted: AcceptedPath) -> list[int]:
        return shown.sequences[tree].emit([*shown.token[accepted.path].tolist(), accepted.bonus])

    def _keep(self, plan: StepPlan, accepted: list[AcceptedPath], kept: list[list[int]]) -> None:
        """Compact the accepted paths in the target's KV, and let the drafter do the same."""
        moves: list[KvMove] = []
        for tree, sequence in enumerate(plan.shown.sequences):
            path = accepted[tree].path
            if len(path):
                root = len(sequence.ids) - len(kept[tree]) - 1  # its KV index
                places = np.searchsorted(plan.shown.nodes_of(tree), path)
                moves.append(KvMove(sequence.slot, root + 1, root + places))
            sequence.cached = len(sequence.ids) - 1
            if self._drafter is not None and plan.layers:  # else it has nothing to forget, and reads lazily
                self._drafter.commit(plan.forest, tree, plan.nodes[path], kept[tree])
        self._target.compact(moves)

    def _number(
        self,
        batch: Batch,
        plan: StepPlan,
        accepted: list[AcceptedPath],
        kept: list[list[int]],
        told: list[Logprobs],
        timer: _StepTimer,
    ) -> list[StepResult]:
        step_ms = timer.step_ms()
        times = StepTimes(timer.verify_ms, step_ms)
        plain_step_ms = self._planner.learn(batch, plan, accepted, sum(map(len, kept)), times)
        shown = plan.shown
        trees = len(shown.sequences)
        nodes = np.bincount(shown.tree, minlength=trees) - 1
        depths = np.zeros(trees, np.int64)
        np.maximum.at(depths, shown.tree, shown.depth)
        expected = shown.expected(np.ones(shown.size, np.bool_))
        siblings = shown.siblings()
        results = []
        for tree, sequence in enumerate(shown.sequences):
            stats = StepStats(
                step=sequence.steps,
                tree_nodes=int(nodes[tree]),
                tree_depth=int(depths[tree]),
                accepted_tokens=min(len(accepted[tree].path), len(kept[tree])),
                emitted_tokens=len(kept[tree]),
                expected_accepted=float(expected[tree]),
                draft_ms=timer.draft_ms,
                verify_ms=timer.verify_ms,
                step_ms=step_ms + sequence.prefill_ms,
                batch_sequences=trees,
                drafter=plan.way.drafter.name if plan.way and nodes[tree] else None,
                plain_step_ms=plain_step_ms,
                decision=plan.decision,
                reached=_reached(tree, accepted[tree].path, len(kept[tree]), *siblings) if nodes[tree] else None,
            )
            traced = _shown_tree(shown, tree, accepted[tree]) if sequence.steps < sequence.traced_steps else None
            sequence.steps += 1
            sequence.prefill_ms = 0.0
            results.append(StepResult(sequence, tuple(kept[tree]), stats, traced, told[tree]))
        for chunk in batch.chunks:
            if not chunk.completes:
                chunk.sequence.cached = chunk.end
                chunk.sequence.prefill_ms += step_ms
        return results

    def _drop_finished(self) -> None:
        for sequence in self._scheduler.drop_finished():
            # Its tree goes; its text stays as long as it may be shared.
            self._target.truncate(sequence.slot, len(self._scheduler.slots.cached_prefixes.get(sequence.slot, ())))
            if self._drafter is not None:
                self._drafter.drop(sequence)


def _reached(root: int, path: IntArray, kept: int, rank: IntArray, children: IntArray) -> Reached:
    """Return how the target chose below the root and the nodes of an accepted path, as far as that was kept."""
    drawn: list[int | None] = [*rank[path].tolist(), None]
    below = children[[root, *path.tolist()]].tolist()
    places = len(drawn) if kept >= len(path) else kept  # what was cut off at the text's end is no step's
    return tuple((count, one) for count, one in zip(below[:places], drawn[:places], strict=True) if count)


def _shown_tree(shown: Forest, tree: int, accepted: AcceptedPath) -> TracedTree:
    nodes = shown.nodes_of(tree)
    parents = shown.parent[nodes]
    return TracedTree(
        parents=tuple(np.where(parents < 0, -1, np.searchsorted(nodes, parents)).tolist()),
        tokens=tuple(shown.token[nodes].tolist()),
        values=tuple(shown.value[nodes].tolist()),
        accepted=tuple(np.isin(nodes, [nodes[0], *accepted.path]).tolist()),
        bonus=accepted.bonus,
    )


class _StepTimer:
    """Wall times of one step, in milliseconds. What the step before did after its last look belongs to this one."""

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
