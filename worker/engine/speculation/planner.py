"""The planner: what a step drafts, and what of it the target sees. Trees, their depth, or no speculation at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from worker.engine.batch import Batch
from worker.engine.options import EngineOptions, Mode
from worker.engine.segments import IntArray
from worker.engine.speculation.acceptance_model import drawn_tokens
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter, Layer, as_offered, grow
from worker.engine.speculation.regret_guard import Decision, RegretGuard
from worker.engine.speculation.state import DrafterStats, SpeculationState
from worker.engine.speculation.tree_budget import Budget, CostAwareBudget, FixedBudget
from worker.engine.speculation.verifier import AcceptedPath

_CLOSE, _CLEAR = 0.1, 0.25  # gain of drafts up to which the race is close, and from which it is clear
_CLOSER = 8  # times as many plain steps where the race is close
_TRIAL = 0.25  # of the account may go into what drafters must read before they have earned anything
_GLANCE = 0.02  # of a step that a layer takes at most which need not pay, if it finds nothing
_HORIZON = 32  # steps over which a draft that has caught up is expected to pay


@dataclass(frozen=True, slots=True)
class _Way:
    """A way of drafting, and what it costs and earns."""

    drafter: Drafter
    ledger: DrafterStats


@dataclass(frozen=True, slots=True)
class _Start:
    """How a step drafts, and for whom."""

    way: _Way
    roots: IntArray
    behind: int  # committed tokens that the drafter must read for them


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The draft trees of one step."""

    forest: Forest  # every drafted node
    shown: Forest  # those that the target sees
    nodes: IntArray  # for each node of `shown` its number in `forest`
    layers: list[Layer]
    decision: Decision
    way: _Way | None = None  # how it was drafted
    reading_ms: float = 0.0  # that the drafter took to catch up, if it was far behind
    look_ms: float = 0.0  # that a glance for drafts took which found nothing


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the time of a step went, in milliseconds."""

    verify_ms: float
    step_ms: float  # all of it, bookkeeping included


class Planner:
    """Plans the steps of one engine and learns from them."""

    def __init__(
        self,
        options: EngineOptions,
        drafter: Drafter | None,
        costs: CostModel | None,
        state: SpeculationState,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Plan with `drafter` as `options.mode` says; opt-tree mode needs `costs`. `clock` returns seconds."""
        self._options = options
        self._clock = clock
        self._costs = costs
        self._state = state
        self._acceptance = state.acceptance
        self._learned = options.mode is Mode.OPT_TREE or options.calibrated
        self._ways = [] if drafter is None else [_Way(drafter, state.whole)]
        if drafter is not None and drafter.forward_free is not None and options.mode is Mode.OPT_TREE:
            self._ways.append(_Way(drafter.forward_free, state.free))

    def plan(self, batch: Batch) -> StepPlan:
        """Decide what the decoding sequences of a batch show to the target."""
        began = self._clock()
        forest = Forest(batch.emitting, self._acceptance.worth if self._learned else 1.0)
        start = self._start(batch)
        if isinstance(start, Decision):
            return StepPlan(forest, forest, forest.roots, [], start)
        way = start.way
        budget = self._budget(batch, way)
        layers, reading_ms = self._grow(forest, budget, start)
        if forest.size == len(forest.sequences):
            if self._is_glance(len(batch.decoding), way):
                look_ms = (self._clock() - began) * 1e3
                return StepPlan(forest, forest, forest.roots, [], Decision.NO_CANDIDATES, way, look_ms=look_ms)
            return StepPlan(forest, forest, forest.roots, layers, Decision.NO_CANDIDATES, way, reading_ms)
        cut = budget.cut(forest)
        shown = forest.pruned(cut)
        some = shown.size > len(shown.sequences)
        decision = Decision.TREE if some else Decision.UNPROFITABLE
        return StepPlan(forest, shown, np.flatnonzero(cut), layers, decision, way, reading_ms)

    def learn(
        self, batch: Batch, plan: StepPlan, accepted: list[AcceptedPath], tokens: int, times: StepTimes
    ) -> float | None:
        """Learn from a step that was taken and emitted so many tokens.

        Return what it would have taken without drafts, by what was known before; None if nobody knows: it shared a
        prefill.
        """
        if plan.layers:
            self._label(plan, accepted)
        if self._costs is None or batch.chunks:
            return None
        trees, rows = len(batch.decoding), plan.shown.size
        entries = batch.entries * rows / trees
        plain_ms = self._plain_ms(batch, plan, self._costs, times, entries)
        self._settle(plan, trees, tokens, times.step_ms, plain_ms)
        self._costs.observe(rows, entries, times.verify_ms)
        return plain_ms

    def _plain_ms(self, batch: Batch, plan: StepPlan, costs: CostModel, times: StepTimes, entries: float) -> float:
        """Return what the step, whose rows attended to `entries`, would have taken without drafts.

        A plain step has just told, or one with nothing but a glance for drafts.
        """
        trees, rows, pace = len(batch.decoding), plan.shown.size, self._state.pace
        plain_ms = costs.measured_ms(trees, batch.entries)
        forward_ms = costs.measured_ms(rows, entries)
        moment = pace.observe_forward(rows, forward_ms, times.verify_ms)
        if not plan.layers:
            step_ms = times.step_ms - plan.look_ms
            pace.observe_plain(trees, plain_ms, step_ms)
            return step_ms
        # A slow moment of the machine would have slowed a plain step as well: drafts are judged by its speed right now.
        return pace.plain_ms(trees, plain_ms) * moment

    def _settle(self, plan: StepPlan, trees: int, tokens: int, step_ms: float, plain_ms: float) -> None:
        """Book what a step brought to the way in which it was drafted; the others had a rest."""
        for way in self._ways:
            ledger = way.ledger
            if plan.way is not None and way is not plan.way:
                ledger.governor.rest(trees, tokens)
                continue
            ledger.governor.settle(trees, tokens, step_ms, plain_ms, speculated=bool(plan.layers))
            if plan.layers:
                # What was read serves many steps: the account pays it, but it tells nothing of a step's worth.
                earned = tokens - trees * (step_ms - plan.reading_ms) / plain_ms
                ledger.drafts.observe_earned(earned / len(plan.layers[0].frontier))

    def _start(self, batch: Batch) -> _Start | Decision:
        """Return how to draft and for which trees: the first way that may, or the reason why none does."""
        trees = len(batch.decoding)
        if not self._ways or batch.plain:
            return Decision.OFF
        if not trees:
            return Decision.PREFILL
        if self._options.mode is Mode.PAPER:
            way = self._ways[0]
            return _Start(way, np.arange(trees), sum(map(way.drafter.num_uncached_tokens, batch.decoding)))
        self._state.steps += 1
        if self._probes(trees):
            return Decision.PROBE
        decision = Decision.GUARD
        for way in self._ways:
            if self._may(batch, way.ledger.governor):
                start = self._affordable(batch, way)
                if start is not None:
                    return start
                decision = Decision.DRAFT_LAGGING
        return decision

    @staticmethod
    def _may(batch: Batch, governor: RegretGuard) -> bool:
        """Return whether a way of drafting may be used. Beside a prefill nothing is learned, so nothing is tried."""
        trees = len(batch.decoding)
        return not governor.overdrawn(trees) and (not batch.chunks or governor.gain(trees) > 0.0)

    def _probes(self, trees: int) -> bool:
        """Return whether the step is plain on purpose: the first of its kind, then one in so many."""
        state = self._state
        probes = state.pace.unknown(trees) or state.steps - state.probed >= self._probe_every(trees)
        if probes:
            state.probed = state.steps
        return probes

    def _probe_every(self, trees: int) -> int:
        """Return one in how many steps is plain on purpose.

        More where the race is close: there a plain step costs nothing, and the judgement is easily wrong. Fewer where
        drafts gain much, for it costs what they gain.
        """
        every, gain = self._options.probe_every, max(way.ledger.governor.gain(trees) for way in self._ways)
        return max(every // _CLOSER, 2) if gain < _CLOSE else int(every * max(gain / _CLEAR, 1.0))

    def _budget(self, batch: Batch, way: _Way) -> Budget:
        if self._options.mode is Mode.PAPER or self._costs is None:
            return FixedBudget(self._options.nodes, self._options.threshold)
        trees = len(batch.decoding)
        rate, rows = partial(self._rate, batch, self._costs, way), trees + batch.prefill_rows
        return CostAwareBudget(self._options.nodes, self._costs, way.ledger.drafts, rate, rows, batch.entries, trees)

    def _rate(self, batch: Batch, costs: CostModel, way: _Way) -> float:
        """Return the tokens per millisecond that are the price of time in a batch like this."""
        trees = len(batch.decoding)
        plain_ms = self._state.pace.plain_ms(trees, costs.measured_ms(trees, batch.entries))
        return way.ledger.governor.rate(trees, plain_ms)

    def _affordable(self, batch: Batch, way: _Way) -> _Start | None:
        """Return a start with the trees whose reading by the drafter can be paid, those least behind first.

        A drafter reads lazily, so one that was not asked for long, or not yet, must catch up. That is paid from a part
        of the account and from what its trees have lately earned: a draft that never earned anything is tried on few
        texts, and enough is left to see how it does there.
        """
        trees, drafts = len(batch.decoding), way.ledger.drafts
        behind = [way.drafter.num_uncached_tokens(sequence) for sequence in batch.decoding]
        if self._costs is None or max(behind) <= self._options.max_depth:
            return _Start(way, np.arange(trees), sum(behind))
        order = np.argsort(behind, kind="stable")
        reading = np.array(behind)[order].cumsum()
        price = self._rate(batch, self._costs, way) * drafts.row_ms * reading
        expected = _HORIZON * max(drafts.earned, 0.0) * np.arange(1, trees + 1)
        credit = way.ledger.governor.credit(trees)
        count = int((price <= _TRIAL * credit + expected).sum())
        if count == 0 and price[0] <= credit:
            count = 1  # one is enough to learn what drafts are worth
        if not drafts.row_ms:
            count = 1  # and what reading costs
        return _Start(way, np.sort(order[:count]), int(reading[count - 1])) if count else None

    def _is_glance(self, trees: int, way: _Way) -> bool:
        """Return whether a look for drafts that found nothing took next to no time: then the step was a plain one."""
        if self._costs is None or self._options.mode is Mode.PAPER:
            return False
        return way.ledger.drafts.layer_ms(trees) * way.ledger.governor.served(trees) < _GLANCE * trees

    def _grow(self, forest: Forest, budget: Budget, start: _Start) -> tuple[list[Layer], float]:
        """Grow the trees; return what was offered, and the time that went into catching up."""
        started, way = self._clock(), start.way
        valued = self._valued if self._learned else as_offered
        layers = grow(forest, way.drafter, budget, self._options.max_depth, start.roots, valued)
        ms = (self._clock() - started) * 1e3
        return layers, way.ledger.drafts.observe_growth(start.behind, [len(layer.frontier) for layer in layers], ms)

    def _valued(self, forest: Forest, layer: Layer) -> Candidates:
        return self._acceptance.of(forest, layer.frontier, layer.offered)

    def _label(self, plan: StepPlan, accepted: list[AcceptedPath]) -> None:
        """Tell the drafted nodes that the target came by which token it drew there."""
        drawn: dict[int, int] = {}
        for root, kept in enumerate(accepted):
            path = plan.nodes[kept.path].tolist()
            tokens = [*plan.shown.token[kept.path].tolist(), kept.bonus]
            drawn.update(zip([root, *path], tokens, strict=True))
        for layer in plan.layers:
            self._acceptance.learn(plan.forest, layer.frontier, layer.offered, drawn_tokens(layer.frontier, drawn))
        shown = plan.shown.size - len(accepted)
        if shown:
            expected = float(plan.shown.value[len(accepted) :].sum())
            self._acceptance.learn_worth(expected, sum(len(kept.path) for kept in accepted))
        self._acceptance.forget()
