"""The engine: schedule, draft, verify, keep, commit. One call of `step` is one forward of the target.

Token ids in, token ids out: no text, no Redis, no SQL, no environment. Without a drafter this is plain decoding, the
truth that tests compare with and the baseline that benchmarks measure.
"""

from __future__ import annotations

from collections.abc import Hashable
from time import perf_counter

import numpy as np

from worker.engine.budget import Budget, PaperBudget, PricedBudget
from worker.engine.cost_model import CostModel
from worker.engine.draft_tree import Forest
from worker.engine.drafting import Drafter, grow
from worker.engine.language_model import LanguageModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.rows import BoolArray, Move
from worker.engine.scheduler import Batch, Scheduler
from worker.engine.sequence import Sequence
from worker.engine.stats import StepNumbers, StepResult
from worker.engine.verifier import Accepted, walk

_LAYER_MS_WEIGHT = 0.1
_FIRST_PROBE = 8  # steps before the first plain probe: short jobs get one too


class Engine:
    """Decodes many sequences together, each exactly as if it were alone."""

    def __init__(
        self, target: LanguageModel, drafter: Drafter | None, options: EngineOptions, costs: CostModel | None = None
    ) -> None:
        """Build an engine. Opt-tree mode needs `costs`, and a drafter is of no use in plain mode."""
        assert options.mode is not Mode.OPT_TREE or costs is not None, "opt-tree mode prices trees with a cost model"
        self._target = target
        self._drafter = None if options.mode is Mode.PLAIN else drafter
        self._options = options
        self._costs = costs
        self._scheduler = Scheduler(options)
        self._layer_ms = 0.0
        self._steps = 0

    @property
    def room(self) -> int:
        """Sequences that can be added and admitted at once."""
        return self._scheduler.room

    @property
    def free_slots(self) -> int:
        """KV slots that nobody holds."""
        return self._scheduler.slots.free

    def forget(self, slot: int) -> None:
        """Share nothing more of what a free slot holds: somebody has written over it."""
        self._scheduler.slots.forget(slot)

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

    def step(self) -> list[StepResult]:
        """Run one step and return what each emitting sequence got; nothing while a prompt is still being read."""
        clock = _Clock()
        batch = self._scheduler.next_batch()
        if batch.empty:
            return []
        for share in batch.shares:
            self._target.share(share.source, share.target, share.length)
        forest, cut = self._grow(batch)
        shown = forest.pruned(cut)
        clock.drafted()
        segments, rows = batch.pack(shown)
        accepted = walk(shown, self._target.forward(segments), rows)
        clock.verified()
        kept = [self._emit(shown, tree, accepted[tree]) for tree in range(len(shown.sequences))]
        self._keep(forest, cut, shown, accepted, kept)
        results = self._number(batch, shown, accepted, kept, clock)
        self._drop_finished()
        return results

    def _grow(self, batch: Batch) -> tuple[Forest, BoolArray]:
        """Grow trees for the decoding sequences; return every drafted node, and which of them to verify."""
        forest = Forest(batch.emitting)
        self._steps += 1
        probe = self._options.mode is Mode.OPT_TREE and self._steps % self._options.probe_every == _FIRST_PROBE
        if self._drafter is None or probe or not batch.decoding:
            return forest, np.ones(forest.size, np.bool_)
        started = perf_counter()
        cut = grow(forest, self._drafter, self._budget(batch), self._options.max_depth, len(batch.decoding))
        layers = max(1, int(forest.depth.max(initial=0)))
        sample = (perf_counter() - started) * 1e3 / layers
        self._layer_ms += _LAYER_MS_WEIGHT * (sample - self._layer_ms)
        return forest, cut

    def _budget(self, batch: Batch) -> Budget:
        if self._options.mode is Mode.PAPER or self._costs is None:
            return PaperBudget(self._options.nodes, self._options.threshold)
        return PricedBudget(self._options.nodes, self._costs, batch.prefill_rows, self._layer_ms)

    @staticmethod
    def _emit(shown: Forest, tree: int, accepted: Accepted) -> list[int]:
        return shown.sequences[tree].emit([*shown.token[accepted.path].tolist(), accepted.bonus])

    def _keep(
        self, forest: Forest, cut: BoolArray, shown: Forest, accepted: list[Accepted], kept: list[list[int]]
    ) -> None:
        """Compact the accepted paths in the target's KV, and let the drafter do the same."""
        drafted = np.flatnonzero(cut)  # node of `forest` for each node of `shown`
        moves: list[Move] = []
        for tree, sequence in enumerate(shown.sequences):
            prefix = len(sequence.ids) - len(kept[tree]) - 1  # KV index of the root
            path = accepted[tree].path
            if len(path):
                moves.append(Move(sequence.slot, prefix + 1, prefix + np.searchsorted(shown.nodes_of(tree), path)))
            sequence.cached = len(sequence.ids) - 1
            if self._drafter is not None:
                self._drafter.keep(forest, tree, drafted[path], kept[tree])
        self._target.keep(moves)

    def _number(
        self, batch: Batch, shown: Forest, accepted: list[Accepted], kept: list[list[int]], clock: _Clock
    ) -> list[StepResult]:
        step_ms = clock.step_ms()
        self._learn(batch, shown, step_ms - clock.draft_ms)
        sequences = len(shown.sequences)
        comparable = self._costs is not None and not batch.chunks
        plain_step_ms = self._costs.plain_step_ms(sequences) if self._costs and comparable else None
        expected = shown.expected(np.ones(shown.size, np.bool_))
        results = []
        for tree, sequence in enumerate(shown.sequences):
            nodes = shown.nodes_of(tree)
            numbers = StepNumbers(
                step=sequence.steps,
                tree_nodes=len(nodes) - 1,
                tree_depth=int(shown.depth[nodes].max()),
                accepted_tokens=min(len(accepted[tree].path), len(kept[tree])),
                emitted_tokens=len(kept[tree]),
                expected_accepted=float(expected[tree]),
                draft_ms=clock.draft_ms,
                verify_ms=clock.verify_ms,
                step_ms=step_ms + sequence.prefill_ms,
                batch_sequences=sequences,
                drafter=self._drafter.name if self._drafter and len(nodes) > 1 else None,
                plain_step_ms=plain_step_ms,
            )
            sequence.steps += 1
            sequence.prefill_ms = 0.0
            results.append(StepResult(sequence, tuple(kept[tree]), numbers))
        for chunk in batch.chunks:
            if not chunk.completes:
                chunk.sequence.cached = chunk.end
                chunk.sequence.prefill_ms += step_ms
        return results

    def _learn(self, batch: Batch, shown: Forest, plain_ms: float) -> None:
        if self._costs and not batch.chunks and shown.size == len(shown.sequences):
            self._costs.observe_plain(len(shown.sequences), plain_ms)

    def _drop_finished(self) -> None:
        for sequence in self._scheduler.drop_finished():
            if self._drafter is not None:
                self._drafter.drop(sequence)


class _Clock:
    """Wall times of one step, in milliseconds."""

    def __init__(self) -> None:
        self._started = self._last = perf_counter()
        self.draft_ms = 0.0
        self.verify_ms = 0.0

    def drafted(self) -> None:
        self.draft_ms = self._lap()

    def verified(self) -> None:
        self.verify_ms = self._lap()

    def step_ms(self) -> float:
        return (perf_counter() - self._started) * 1e3

    def _lap(self) -> float:
        now = perf_counter()
        lap, self._last = (now - self._last) * 1e3, now
        return lap
