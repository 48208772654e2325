"""Plan a step: what it drafts and what of that the target verifies. Not speculating is the case of empty trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Self

import numpy as np

from worker.engine.batch import Batch
from worker.engine.grammar.constraints import Constraints
from worker.engine.host.growth import CompiledGrowth, growth_library
from worker.engine.host.tree_kernels import tree_kernels
from worker.engine.options import EngineOptions, Mode
from worker.engine.segments import IntArray
from worker.engine.speculation.constants import (
    CLEAR_GAIN,
    CLOSE_GAIN,
    EARNING_HORIZON,
    MAX_FORCED_READS,
    MAX_LOOKUP_SHARE,
    MAX_TRIAL_SHARE,
    PROBE_CLOSE_FACTOR,
)
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.decision import Decision
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter, Growth, Layer, Parts, as_offered, grow, grow_compiled
from worker.engine.speculation.regret_guard import RegretGuard
from worker.engine.speculation.sequence_columns import SequenceColumns
from worker.engine.speculation.state import DrafterStats, SpeculationState
from worker.engine.speculation.tree_budget import Budget, CostAwareBudget, FixedBudget
from worker.engine.speculation.tree_masks import TreeMasks
from worker.engine.speculation.verifier import AcceptedPaths


@dataclass(frozen=True, slots=True)
class _Strategy:
    """A drafter, or the part of it that runs no forward, with its costs and gains."""

    drafter: Drafter
    stats: DrafterStats
    parts: Parts

    @classmethod
    def of(cls, drafter: Drafter, stats: DrafterStats) -> Self:
        """Return a drafter with what was learned about it."""
        return cls(drafter, stats, Parts.of(drafter))

    @property
    def forced_reads(self) -> int:
        """Tokens forced by a grammar that it reads before it drafts beyond them; what runs no forward need not."""
        return 0 if self.drafter.forward_free is self.drafter else MAX_FORCED_READS


@dataclass(frozen=True, slots=True)
class _Start:
    """The strategy that drafts in a step, and the trees for which it does."""

    strategy: _Strategy
    roots: IntArray
    num_uncached_tokens: int  # committed tokens that the drafter must read for them


@dataclass(slots=True, eq=False)
class StepPlan:
    """The draft trees of one step."""

    drafted: Forest  # all nodes
    selected: Forest  # the nodes that the target verifies
    nodes: IntArray  # the index in `drafted` of each node of `selected`
    layers: list[Layer]  # what was offered; none: nothing was drafted
    decision: Decision
    drafted_trees: int = 0  # roots that the first layer expanded
    strategy: _Strategy | None = None  # the one that drafted; None: none did
    catch_up_ms: float = 0.0  # time the drafter took to read uncached tokens, if it had fallen behind
    lookup_ms: float = 0.0  # time of a draft lookup that found no candidates

    @property
    def plain(self) -> bool:
        """True if the step has neither drafts nor forced tokens."""
        return not self.layers and self.selected.size == len(self.selected.sequences)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times of a step, in ms."""

    verify_ms: float
    step_ms: float  # the whole step, bookkeeping included


class Planner:
    """Plans the steps of one engine and learns from them."""

    def __init__(
        self,
        options: EngineOptions,
        drafter: Drafter | None,
        costs: CostModel | None,
        state: SpeculationState,
        clock: Callable[[], float] = perf_counter,
        constraints: Constraints | None = None,
    ) -> None:
        """Plan with `drafter` as `options.mode` says; opt-tree mode needs `costs`. `clock` returns seconds.

        `constraints` are those of all sequences with a grammar.
        """
        self._options = options
        self._constraints = constraints
        self._clock = clock
        self._costs = costs
        self._state = state
        self._columns = SequenceColumns(())  # of the sequences of the last step
        self._after_prefill = False  # the last step read prompts
        self._acceptance = state.acceptance
        self._calibrated = options.mode is Mode.OPT_TREE or options.calibrated
        self._strategies = [] if drafter is None else [_Strategy.of(drafter, state.whole)]
        part = None if drafter is None or drafter.forward_free is drafter else drafter.forward_free
        self._lookup = None if part is None else _Strategy.of(part, state.forward_free)
        if self._lookup is not None and options.mode is Mode.OPT_TREE:
            self._strategies.append(self._lookup)
        library = growth_library()
        self._compiled = None if library is None else CompiledGrowth(library, options.max_depth)

    def plan(self, batch: Batch) -> StepPlan:
        """Draft for the decoding sequences of a batch, and select what the target verifies."""
        started = self._clock()
        if self._columns.sequences != batch.emitting:
            self._columns = SequenceColumns(batch.emitting)
        discount = self._acceptance.tree_discount if self._calibrated else 1.0
        forest = Forest(self._columns, discount, self._masks())
        start = self._start(batch, forest)
        if isinstance(start, Decision):
            return self._without_drafts(batch, forest, start)
        strategy = start.strategy
        budget = self._budget(batch, strategy)
        growth, catch_up_ms = self._grow(batch, forest, budget, start)
        found = StepPlan(
            drafted=forest,
            selected=forest,
            nodes=forest.roots,
            layers=growth.layers,
            decision=Decision.UNPROFITABLE,
            drafted_trees=growth.expanded[0] if growth.expanded else 0,
            strategy=strategy,
            catch_up_ms=catch_up_ms,
        )
        if forest.drafts_nothing:
            found.decision = Decision.NO_CANDIDATES
            if self._is_cheap_lookup(len(batch.decoding), strategy):
                found.layers, found.catch_up_ms, found.lookup_ms = [], 0.0, (self._clock() - started) * 1e3
        return self._cut(found, budget)

    def _masks(self) -> TreeMasks | None:
        """Return the masks of the step's trees; None if no sequence has a grammar."""
        if self._constraints is None or not self._columns.any_constrained:
            return None
        return TreeMasks(self._columns, self._constraints)

    @staticmethod
    def _roots(batch: Batch, forest: Forest, reads: int = 0) -> IntArray:
        """Return the roots of decoding sequences below which a drafter may propose.

        Not those where a grammar forces tokens, but if these are at most `reads` and others may follow them.
        """
        roots, masks = _drafted(batch, forest), forest.masks
        if masks is None:
            return roots
        stretches = [masks.root(tree) if masks.constrained[tree] else None for tree in roots.tolist()]
        return roots[[found is None or (found.open and len(found.tokens) <= reads) for found in stretches]]

    def _without_drafts(self, batch: Batch, forest: Forest, reason: Decision) -> StepPlan:
        """Return a plan without drafts, but with forced tokens unless it is to be plain or has no memory for them."""
        allowed = (Decision.GUARD, Decision.DRAFT_LAGGING, Decision.GRAMMAR)
        if forest.masks is not None and reason in allowed:
            forest.force(_drafted(batch, forest))
            return self._cut(
                StepPlan(forest, forest, forest.roots, [], reason), self._budget(batch, self._strategies[0])
            )
        return StepPlan(forest, forest, forest.roots, [], reason)

    def _cut(self, plan: StepPlan, budget: Budget) -> StepPlan:
        """Let a plan verify the nodes that are worth it; its decision stays if none is."""
        forest = plan.drafted
        if forest.size == forest.trees:
            return plan
        if self._grows_compiled(forest):
            assert self._compiled is not None
            plan.selected = forest.emptied()
            plan.nodes = self._compiled.cut(forest, plan.selected)
            if plan.selected.size > forest.trees:
                plan.decision = Decision.TREE
            return plan
        cut = budget.cut(forest)
        plan.selected, plan.nodes = forest.pruned(cut), np.flatnonzero(cut)
        drafted = ~plan.selected.forced[forest.trees :]
        if len(drafted):
            plan.decision = Decision.TREE if drafted.any() else Decision.GRAMMAR
        return plan

    def _grows_compiled(self, forest: Forest) -> bool:
        """Return whether the trees grow in C: not those of grammars, whose masks are computed in Python."""
        return self._compiled is not None and forest.masks is None

    def learn(
        self, batch: Batch, plan: StepPlan, accepted: AcceptedPaths, tokens: int, times: StepTimes
    ) -> float | None:
        """Learn from a step that emitted `tokens` tokens in all.

        Return the ms that it would have taken without drafts. None if that can't be told, because it shared a prefill.
        """
        if plan.layers:
            self._learn_acceptance(plan, accepted)
        after_prefill, self._after_prefill = self._after_prefill, bool(batch.chunks)
        if self._costs is None or batch.chunks:
            return None
        if plan.plain and after_prefill and self._state.plain_steps.passes_over(len(batch.decoding)):
            return times.step_ms - plan.lookup_ms
        batch_size, rows, plain_entries = len(batch.decoding), plan.selected.size, batch.entries
        entries = plain_entries * rows / batch_size
        plain_ms = self._plain_ms(plan, self._costs, times, plain_entries, entries)
        forced = int(plan.selected.forced[accepted.visited].sum()) if plan.selected.masks is not None else 0
        forced_ms = times.verify_ms * self._share(self._costs, rows, entries, forced)
        self._update_guards(plan, batch_size, tokens - forced, times.step_ms - forced_ms, plain_ms)
        self._costs.observe(rows, entries, times.verify_ms)
        return plain_ms

    @staticmethod
    def _share(costs: CostModel, rows: int, entries: float, forced: int) -> float:
        """Return the share of a step's accepted forced tokens in the time of its forward.

        Guards are told of the step as if it had not had them: they come with any draft and without one. Forced tokens
        below a rejected draft are that draft's cost.
        """
        if not forced:
            return 0.0
        without = costs.step_ms(rows - forced, entries * (rows - forced) / rows)
        return float(1.0 - without / costs.step_ms(rows, entries))

    def _plain_ms(
        self, plan: StepPlan, costs: CostModel, times: StepTimes, plain_entries: float, entries: float
    ) -> float:
        """Return the ms that the step, whose rows attended to `entries`, would have taken without drafts.

        A plain step has measured it; so has one whose lookup found no candidates.
        """
        batch_size, rows, plain_steps = len(plan.selected.sequences), plan.selected.size, self._state.plain_steps
        calibrated_ms = costs.calibrated_ms(batch_size, plain_entries)
        forward_ms = costs.calibrated_ms(rows, entries)
        slowdown = plain_steps.observe_forward(rows, forward_ms, times.verify_ms)
        if plan.plain:
            step_ms = times.step_ms - plan.lookup_ms
            plain_steps.observe_plain(batch_size, calibrated_ms, step_ms)
            return step_ms
        # What slowed the machine at this moment would have slowed a plain step as well.
        return plain_steps.plain_ms(batch_size, calibrated_ms) * slowdown

    def _update_guards(self, plan: StepPlan, batch_size: int, tokens: int, step_ms: float, plain_ms: float) -> None:
        """Book a step with the guard of the strategy that drafted it, or with all guards if none did.

        The guards of the other strategies count an idle step.
        """
        for strategy in self._strategies:
            stats = strategy.stats
            if plan.strategy is not None and strategy is not plan.strategy:
                stats.guard.observe_idle(batch_size, tokens)
                continue
            stats.guard.observe(batch_size, tokens, step_ms, plain_ms, speculated=bool(plan.layers))
            if plan.layers:
                # The guard pays for catching up. It serves many steps, so it is no part of what this one gained.
                gain = tokens - batch_size * (step_ms - plan.catch_up_ms) / plain_ms
                stats.costs.observe_gain(gain / plan.drafted_trees)

    def _start(self, batch: Batch, forest: Forest) -> _Start | Decision:
        """Return the first strategy that may draft and for which of the roots, or the reason why none may."""
        batch_size = len(batch.decoding)
        if not self._strategies or batch.plain:
            return Decision.OFF
        if not batch_size:
            return Decision.PREFILL
        if not len(_drafted(batch, forest)):
            return Decision.OFF
        if batch.draft_rows < (batch_size if self._options.mode is Mode.PAPER else 1):
            return Decision.MEMORY
        if self._options.mode is Mode.PAPER:
            strategy = self._strategies[0]
            roots = self._roots(batch, forest, strategy.forced_reads)
            uncached = sum(strategy.drafter.num_uncached_tokens(batch.decoding[root]) for root in roots.tolist())
            return _Start(strategy, roots, uncached) if len(roots) else Decision.GRAMMAR
        self._state.steps += 1
        if self._probes(batch_size, forced=forest.masks is not None and len(self._roots(batch, forest)) < batch_size):
            return Decision.PROBE
        decision = Decision.GUARD
        for strategy in self._strategies:
            roots = self._roots(batch, forest, strategy.forced_reads)
            if not len(roots):
                decision = Decision.GRAMMAR
            elif self._may_draft(batch, strategy.stats.guard):
                start = self._affordable(batch, strategy, roots)
                if start is not None:
                    return start
                decision = Decision.DRAFT_LAGGING
        return decision

    @staticmethod
    def _may_draft(batch: Batch, guard: RegretGuard) -> bool:
        """Return whether a strategy may be used. Beside a prefill it must gain: such steps teach nothing."""
        batch_size = len(batch.decoding)
        return not guard.blocked(batch_size) and (not batch.chunks or guard.gain(batch_size) > 0.0)

    def _probes(self, batch_size: int, *, forced: bool) -> bool:
        """Return whether the step is plain on purpose: the first of its load class, then one in `_probe_interval`.

        One with `forced` tokens, which it would not verify, waits for one without, but for no longer than once more.
        """
        state = self._state
        since = state.steps - state.last_probe
        interval = self._probe_interval(batch_size) * (2 if forced else 1)
        probes = state.plain_steps.unknown(batch_size) or since >= interval
        if probes:
            state.last_probe = state.steps
        return probes

    def _probe_interval(self, batch_size: int) -> int:
        """Return the number of steps per probe.

        Fewer where plain decoding and drafts are close: a probe costs nothing there, and the judgement is easily wrong.
        More where drafts gain much: a probe costs what they gain.
        """
        interval = self._options.probe_every
        gain = max(strategy.stats.guard.gain(batch_size) for strategy in self._strategies)
        if gain < CLOSE_GAIN:
            return max(interval // PROBE_CLOSE_FACTOR, 2)
        return int(interval * max(gain / CLEAR_GAIN, 1.0))

    def _budget(self, batch: Batch, strategy: _Strategy) -> Budget:
        batch_size = len(batch.decoding)
        if self._options.mode is Mode.PAPER or self._costs is None:
            return FixedBudget(min(self._options.nodes, batch.draft_rows // batch_size), self._options.threshold)
        price, rows = partial(self._time_price, batch, self._costs, strategy), batch_size + batch.prefill_rows
        drafts, nodes, limit = strategy.stats.costs, self._options.nodes, batch.draft_rows
        return CostAwareBudget(nodes, self._costs, drafts, price, rows, batch.entries, batch_size, limit)

    def _time_price(self, batch: Batch, costs: CostModel, strategy: _Strategy) -> float:
        """Return the opportunity cost of a ms in a batch like this, in tokens."""
        batch_size = len(batch.decoding)
        calibrated_ms = costs.calibrated_ms(batch_size, batch.entries)
        return strategy.stats.guard.time_price(batch_size, self._state.plain_steps.plain_ms(batch_size, calibrated_ms))

    def _affordable(self, batch: Batch, strategy: _Strategy, roots: IntArray) -> _Start | None:
        """Return a start with the roots for which the drafter can afford to catch up, fewest uncached tokens first.

        A drafter reads lazily: if it was not used for a while, it must read what was written since. That is paid from a
        part of the guard's tokens plus what its trees are expected to gain. So a draft that never gained anything is
        tried on few sequences, and enough is left to measure its gain there.
        """
        batch_size, drafts = len(batch.decoding), strategy.stats.costs
        uncached = [strategy.drafter.num_uncached_tokens(batch.decoding[root]) for root in roots.tolist()]
        if self._costs is None or max(uncached) <= self._options.max_depth:
            return _Start(strategy, roots, sum(uncached))
        order = np.argsort(uncached, kind="stable")
        to_read = np.array(uncached)[order].cumsum()
        price = self._time_price(batch, self._costs, strategy) * drafts.row_ms * to_read
        expected = EARNING_HORIZON * max(drafts.gain, 0.0) * np.arange(1, len(roots) + 1)
        tokens = strategy.stats.guard.tokens(batch_size)
        count = int((price <= MAX_TRIAL_SHARE * tokens + expected).sum())
        if count == 0 and price[0] <= tokens:
            count = 1  # one is enough to measure the gain
        if not drafts.row_ms:
            count = 1  # and to measure the time of reading
        return _Start(strategy, roots[np.sort(order[:count])], int(to_read[count - 1])) if count else None

    def _is_cheap_lookup(self, batch_size: int, strategy: _Strategy) -> bool:
        """Return whether drafting that found no candidates took next to no time: then the step was a plain one."""
        if self._costs is None or self._options.mode is Mode.PAPER:
            return False
        stats = strategy.stats
        return stats.costs.first_ms(batch_size) * stats.guard.throughput(batch_size) < MAX_LOOKUP_SHARE * batch_size

    def _grow(self, batch: Batch, forest: Forest, budget: Budget, start: _Start) -> tuple[Growth, float]:
        """Grow the trees; return what was offered, and the ms that went into catching up.

        Forced tokens come first. What follows them is drafted by the strategy if it runs no forward or reads them, and
        otherwise by its part that runs none.
        """
        if forest.masks is None:
            return self._grow_from(forest, budget, start)
        _, ends = forest.force(_drafted(batch, forest))
        taken = np.isin(forest.tree[ends], start.roots) if start.strategy.forced_reads else np.ones(len(ends), np.bool_)
        growth, catch_up_ms = self._grow_from(forest, budget, start, ends[taken])
        detached = np.concatenate([growth.detached, ends[~taken]])
        if not len(detached) or self._lookup is None:
            return growth, catch_up_ms
        further, _ = self._grow_from(forest, self._budget(batch, self._lookup), _Start(self._lookup, detached, 0))
        both = Growth([*growth.layers, *further.layers], [*growth.expanded, *further.expanded], further.detached)
        return both, catch_up_ms

    def _grow_from(
        self, forest: Forest, budget: Budget, start: _Start, forced: IntArray | None = None
    ) -> tuple[Growth, float]:
        began, strategy, depth = self._clock(), start.strategy, self._options.max_depth
        if self._grows_compiled(forest):
            assert self._compiled is not None
            correction = self._acceptance.correction(forest) if self._calibrated else None
            growth = grow_compiled(self._compiled, forest, strategy.parts, budget, depth, start.roots, correction)
        else:
            growth = self._grow_layers(forest, budget, start, forced)
        ms = (self._clock() - began) * 1e3
        return growth, strategy.stats.costs.observe_growth(start.num_uncached_tokens, growth.expanded, ms)

    def _grow_layers(self, forest: Forest, budget: Budget, start: _Start, forced: IntArray | None) -> Growth:
        calibrate = self._calibrate if self._calibrated else as_offered
        forced = start.roots[:0] if forced is None else forced
        drafter, max_depth = start.strategy.drafter, self._options.max_depth
        return grow(forest, drafter, budget, max_depth, start.roots, calibrate, forced)

    def _calibrate(self, forest: Forest, layer: Layer) -> Candidates:
        return self._acceptance.of(forest, layer.frontier, layer.offered)

    def _learn_acceptance(self, plan: StepPlan, accepted: AcceptedPaths) -> None:
        """Label the drafted nodes that the target reached with the token that it drew there."""
        self._learn_discount(plan.selected, accepted)
        at = (plan.nodes, accepted.visited, accepted.drawn)
        if self._grows_compiled(plan.drafted):
            assert self._compiled is not None
            self._acceptance.learn_growth(self._compiled, plan.drafted, at)
            return
        for layer in plan.layers:
            drawn = tree_kernels().drawn_at(plan.drafted, *at, layer.frontier)
            self._acceptance.learn(plan.drafted, layer.frontier, layer.offered, drawn)
        self._acceptance.forget()

    def _learn_discount(self, selected: Forest, accepted: AcceptedPaths) -> None:
        """Learn what trees are worth: the tokens that were expected of the drafted nodes, and those accepted."""
        trees, values = selected.trees, selected.value[selected.trees :]
        count = len(accepted.visited) - trees
        if selected.masks is not None:
            drafted = ~selected.forced
            drafted[:trees] = False
            values, count = selected.value[drafted], int(drafted[accepted.visited].sum())
        if len(values):
            self._acceptance.learn_discount(float(values.sum()), count)


def _drafted(batch: Batch, forest: Forest) -> IntArray:
    """Return the roots of the decoding sequences that may have drafts."""
    roots = np.arange(len(batch.decoding))
    return roots if forest.columns.all_drafted else roots[forest.columns.drafted[: len(roots)]]
