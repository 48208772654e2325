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
from worker.engine.errors import EngineError, NanLogits
from worker.engine.grammar.constraints import Constraints
from worker.engine.grammar.vocabulary import GrammarVocabulary
from worker.engine.kv.slot_allocator import Truncation
from worker.engine.logprobs import compute_logprobs, score_prompts
from worker.engine.model.packed_model import ChoosesFactors, LanguageModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.scheduler import Scheduler
from worker.engine.segments import IntArray, ranges
from worker.engine.sequence import Sequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.planner import Planner, StepPlan, StepTimes
from worker.engine.speculation.sequence_columns import SequenceColumns
from worker.engine.speculation.state import SpeculationState
from worker.engine.speculation.verifier import AcceptedPaths, walk
from worker.engine.stats import REASONS, EmittedTokens, StepBatch, TracedTree
from worker.engine.token_logprobs import Logprobs


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
        vocabulary: GrammarVocabulary | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Build an engine. Opt-tree mode needs `costs`; plain mode ignores `drafter`.

        `state` is what an earlier engine with the same drafter has learned; this one continues from it. Sequences with
        a grammar need a `vocabulary`. `clock` returns seconds, and is the only clock that the engine reads.
        """
        assert options.mode is not Mode.OPT_TREE or costs is not None, "opt-tree mode needs a cost model"
        self._target = target
        self._drafter = None if options.mode is Mode.PLAIN else drafter
        self._options = options
        self._state = state or SpeculationState()
        self._clock = clock
        forced = options.forced_tokens and options.mode is not Mode.PLAIN
        self._constraints = Constraints(vocabulary, options.nodes if forced else 0)
        self._planner = Planner(options, self._drafter, costs, self._state, clock, self._constraints)
        self._failed: list[Sequence] = []
        self._scheduler = Scheduler(options)
        target.clear()  # of the sequences of an earlier engine
        self._long_slots: set[int] = set()  # whose rows have the long factors of longrope
        self._late_ms = 0.0  # time of the previous step after it was measured
        self._preemptions = self._recomputed_tokens = 0

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
        self._truncate(self._scheduler.slots.pop_truncations())

    @property
    def preemptions(self) -> int:
        """How often a sequence has lost its KV memory to others."""
        return self._preemptions

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that were prefilled again after preemptions."""
        return self._recomputed_tokens

    @property
    def learned(self) -> dict[str, Any]:
        """What the engine has learned about drafts, as JSON."""
        return self._state.as_json()

    @property
    def busy(self) -> bool:
        """True while some sequence is not finished."""
        return self._scheduler.busy

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, new or resumed. It must be shorter than the context by one token at least.

        Raises SequenceTooLong if it never fits into memory, and GrammarsRefused.
        """
        assert len(sequence.ids) < self._options.max_context, "the sequence fills the context: no token can be added"
        self._constraints.add(sequence)
        try:
            self._scheduler.add(sequence)
        except EngineError:
            self._constraints.drop([sequence])
            raise

    def cancel(self, keys: set[Hashable]) -> None:
        """End sequences by key, without another token."""
        sequences = self._scheduler.of(keys)
        for sequence in sequences:
            sequence.cancelled = True
        self._drop_finished(sequences)

    def pop_failed(self) -> list[Sequence]:
        """Return the sequences that the last step ended without an output: their `failure` says why."""
        failed, self._failed = self._failed, []
        return failed

    def step(self, only: Collection[Hashable] | None = None, *, plain: bool = False) -> StepBatch:
        """Run one step and return what each emitting sequence got: nothing while prompts are still being read.

        The step is of all sequences, or of those whose keys are in `only`. A `plain` step uses no drafts. Raises
        NanLogits, before any sequence has changed, if no token can be drawn for some of them.
        """
        timer = _StepTimer(self._clock, self._late_ms)
        batch = self._scheduler.next_batch(only, plain=plain)
        self._move_memory(batch)
        if batch.empty:
            return StepBatch.empty()
        plan = self._planner.plan(batch)
        timer.drafted()
        self._grow_trees(plan.selected)
        segments, rows, prompt_rows = batch.pack(plan.selected)
        if plan.selected.masks is not None:
            plan.selected.masks.start(plan.selected)
        self._mark_long(batch)
        logits = self._target.forward(segments)
        accepted = walk(plan.selected, logits, rows)
        stuck = _grammar_failures(plan.selected, accepted)
        if min(accepted.drawn.tolist(), default=0) < 0:
            undrawn = [tree for tree in np.flatnonzero(accepted.bonus < 0).tolist() if tree not in stuck]
            if undrawn:
                raise NanLogits([plan.selected.sequences[tree] for tree in undrawn])
        timer.verified()
        score_prompts(batch.chunks, logits, prompt_rows)
        self._count_recomputed(batch)
        emitted = _emit(plan.selected.sequences, accepted, stuck)
        self._constraints.prepare(s for s in plan.selected.sequences if not s.finished)
        logprobs = compute_logprobs(plan.selected, logits, rows, accepted, emitted.counts)
        self._commit(plan, accepted, emitted)
        results = self._results(batch, plan, accepted, emitted, logprobs, timer)
        self._give_up(plan.selected.sequences, stuck)
        self._drop_finished(plan.selected.sequences)
        self._late_ms = timer.late_ms()
        return results

    def _move_memory(self, batch: Batch) -> None:
        """Free and copy KV entries as the step needs it."""
        for sequence in batch.preempted:
            self._preemptions += 1
            if self._drafter is not None:
                self._drafter.drop(sequence)
        self._truncate(batch.truncations)
        for copy in batch.prefix_copies:
            self._target.copy_prefix(copy.source, copy.target, copy.length)

    def _mark_long(self, batch: Batch) -> None:
        """Tell the target which slots have long texts; a text gets its slot before its first chunk."""
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if sequence.long != (sequence.slot in self._long_slots):
                assert isinstance(self._target, ChoosesFactors)
                self._target.mark_long(sequence.slot, sequence.long)
                self._long_slots ^= {sequence.slot}

    def _truncate(self, truncations: Iterable[Truncation]) -> None:
        for slot, length in truncations:
            self._target.truncate(slot, length)

    def _grow_trees(self, selected: Forest) -> None:
        """Take KV memory for the draft nodes of the step."""
        if selected.size > len(selected.sequences):
            tree_nodes, _, _ = selected.summary()
            self._truncate(self._scheduler.grow_trees(selected.sequences, tree_nodes.tolist()))

    def _count_recomputed(self, batch: Batch) -> None:
        for chunk in batch.chunks:
            sequence = chunk.sequence
            tokens = max(0, min(chunk.end, sequence.computed) - sequence.cached)
            sequence.recomputed_tokens += tokens
            self._recomputed_tokens += tokens

    def _commit(self, plan: StepPlan, accepted: AcceptedPaths, emitted: EmittedTokens) -> None:
        """Compact the accepted paths in the target's KV, and let the drafter do the same."""
        sequences = plan.selected.sequences
        if len(accepted.visited) > len(sequences):
            self._target.compact(plan.selected.moves(accepted.counts, accepted.visited))
        for sequence in sequences:
            sequence.cached = len(sequence.ids) - 1
        if self._drafter is not None and plan.layers:  # without layers it has no tree, and it catches up lazily
            nodes, tokens, first = plan.nodes[accepted.visited], emitted.lists(), 1  # behind the root
            for tree, count in enumerate(accepted.counts.tolist()):
                self._drafter.commit(plan.drafted, tree, nodes[first : first + count], tokens[tree])
                first += count + 1

    def _results(
        self,
        batch: Batch,
        plan: StepPlan,
        accepted: AcceptedPaths,
        emitted: EmittedTokens,
        logprobs: dict[int, Logprobs],
        timer: _StepTimer,
    ) -> StepBatch:
        """Let the planner learn from the step, and return each sequence's part of it."""
        step_ms = timer.step_ms()
        times = StepTimes(timer.verify_ms, step_ms)
        plain_step_ms = self._planner.learn(batch, plan, accepted, len(emitted.tokens), times)
        selected, sequences = plan.selected, plan.selected.sequences
        steps = np.array([s.steps for s in sequences], np.int64)
        zeros = selected.columns.zeros
        traced = np.flatnonzero(steps < selected.columns.traced_steps).tolist() if selected.columns.any_traced else ()
        tree_nodes, tree_depths, expected = selected.summary()
        reached_counts, reached = selected.drawn_ranks(accepted.counts, accepted.visited, emitted.counts)
        results = StepBatch(
            numbers=selected.columns.numbers,
            counts=emitted.counts,
            tokens=emitted.tokens,
            reasons=emitted.reasons,
            steps=steps,
            preemptions=self._since_last_token(selected.columns, "new_preemptions"),
            recomputed_tokens=self._since_last_token(selected.columns, "recomputed_tokens"),
            tree_nodes=tree_nodes,
            forced_nodes=selected.forced_nodes(),
            tree_depths=tree_depths,
            accepted_tokens=np.minimum(accepted.counts, emitted.counts) if tree_nodes is not zeros else zeros,
            expected_accepted=expected,
            step_ms=step_ms + np.array([s.prefill_ms for s in sequences], np.float64),
            reached_counts=reached_counts,
            reached=reached,
            draft_ms=timer.draft_ms,
            verify_ms=timer.verify_ms,
            plain_step_ms=plain_step_ms,
            drafter=plan.strategy.drafter.name if plan.strategy else None,
            decision=plan.decision,
            trees={tree: _traced_tree(selected, tree, accepted) for tree in traced},
            logprobs=logprobs,
            prompt_logprobs=_read_prompts(batch),
        )
        for sequence in sequences:
            sequence.steps += 1
            sequence.prefill_ms = 0.0
        for chunk in batch.chunks:
            if not chunk.completes:
                chunk.sequence.cached = chunk.end
                chunk.sequence.prefill_ms += step_ms
        return results

    def _since_last_token(self, columns: SequenceColumns, counter: str) -> IntArray:
        """Return a counter of each sequence, and reset it."""
        if not self._preemptions:
            return columns.zeros
        counts = np.zeros(len(columns.sequences), np.int64)
        for index, sequence in enumerate(columns.sequences):
            counts[index] = getattr(sequence, counter)
            setattr(sequence, counter, 0)
        return counts

    def _give_up(self, sequences: tuple[Sequence, ...], stuck: dict[int, str]) -> None:
        """End the sequences whose grammars allow no further token, but those that ended before they got there."""
        for tree, reason in stuck.items():
            sequence = sequences[tree]
            if sequence.finish_reason is None:
                sequence.failure, sequence.cancelled = reason, True
                self._failed.append(sequence)

    def _drop_finished(self, candidates: Collection[Sequence]) -> None:
        self._constraints.drop(sequence for sequence in candidates if sequence.finished)
        for sequence in self._scheduler.drop_finished(candidates):
            if self._drafter is not None:
                self._drafter.drop(sequence)
        # Release the trees; the KV entries that stay are cached for later sequences with this prefix.
        self._truncate(self._scheduler.slots.pop_truncations())


def _grammar_failures(selected: Forest, accepted: AcceptedPaths) -> dict[int, str]:
    """Return why the grammar allows no token at the end of a tree's accepted path, by tree."""
    if selected.masks is None:
        return {}
    undrawn = np.flatnonzero(accepted.bonus < 0)
    last = accepted.visited[accepted.firsts[undrawn] + accepted.counts[undrawn]]
    reasons = zip(undrawn.tolist(), map(selected.masks.failure, last.tolist()), strict=True)
    return {tree: reason for tree, reason in reasons if reason}


def _emit(sequences: tuple[Sequence, ...], accepted: AcceptedPaths, stuck: Collection[int] = ()) -> EmittedTokens:
    """Append what the target drew to the sequences: the accepted tokens and its own, which `stuck` trees have not."""
    counts = accepted.counts + 1
    drawn, ends = accepted.drawn.tolist(), counts.cumsum().tolist()
    ended = []
    for tree, (sequence, first, end) in enumerate(zip(sequences, [0, *ends], ends, strict=False)):
        kept = len(sequence.emit(drawn[first : end - (tree in stuck)]))
        if sequence.finish_reason is not None or tree in stuck:
            ended.append(tree)
            counts[tree] = kept
    tokens, reasons = accepted.drawn, np.zeros(len(sequences), np.int64)
    if ended:
        tokens = tokens[ranges(accepted.firsts, counts)]
        reasons[ended] = [REASONS.index(sequences[tree].finish_reason) for tree in ended]
    return EmittedTokens(counts, tokens, reasons)


def _read_prompts(batch: Batch) -> dict[int, Logprobs]:
    """Return the log-probabilities of the prompts whose prefill completes, by index among the emitting sequences."""
    completing = [chunk.sequence for chunk in batch.chunks if chunk.completes]
    return {
        index: tuple(sequence.prompt_logprobs)
        for index, sequence in enumerate(completing, start=len(batch.decoding))
        if sequence.prompt_top is not None
    }


def _traced_tree(selected: Forest, tree: int, accepted: AcceptedPaths) -> TracedTree:
    nodes = selected.nodes_of(tree)
    parents = selected.parent[nodes]
    return TracedTree(
        parents=tuple(np.where(parents < 0, -1, np.searchsorted(nodes, parents)).tolist()),
        tokens=tuple(selected.token[nodes].tolist()),
        values=tuple(selected.value[nodes].tolist()),
        accepted=tuple(np.isin(nodes, [nodes[0], *accepted.path(tree)]).tolist()),
        bonus=int(accepted.bonus[tree]),
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
