"""Measure the speed-up of draft trees over plain decoding at each acceptance and batch size.

Both engines decode the same sequences on the same target, in turns. A run is timed while the batch is full: from the
first token of all sequences until one of them ends. So a run says what a long job gains, whose batch stays full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from worker.bench.acceptance.drafter import PausableClock, ProfileDrafter
from worker.bench.acceptance.pair import RandomPair
from worker.bench.acceptance.profile import AcceptanceProfile
from worker.bench.interleaved import run_interleaved
from worker.engine.engine import Engine
from worker.engine.options import Mode
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.state import SpeculationState
from worker.engine.stats import StepBatch

_MIN_SHARE = 0.25  # of the plain tokens of a full run: a run that time ends before counts for nothing


@dataclass(frozen=True, slots=True)
class CurvePlan:
    """What a curve measures."""

    profiles: tuple[AcceptanceProfile, ...]
    batches: tuple[int, ...]  # ascending: as in a worker, a state that was learned at one serves the next
    tokens: int  # of each text
    runs: int
    cell_s: float  # wall time after which a cell starts no further run, and its run ends
    seed: int = 0


@dataclass(frozen=True, slots=True)
class CurveCell:
    """Speed-up at one acceptance and batch size."""

    profile: str
    acceptance: float  # of the first candidate below a root
    batch: int
    speedups: tuple[float, ...] = ()  # opt-tree over plain, of each run; in the first one the state is still learned
    tokens_per_step: float = 0.0  # per sequence, of the last run
    nodes_per_step: float = 0.0  # draft nodes that were verified, the same
    decisions: tuple[tuple[str, int], ...] = ()  # of the steps of the last run
    texts_agree: bool = True  # both engines wrote what plain decoding had written before
    skipped: str = ""  # why nothing was measured

    @property
    def speedup(self) -> float | None:
        """The median of the runs after the first one; None: nothing was measured."""
        settled = self.speedups[1:] or self.speedups
        return median(settled) if settled else None


class _TimedEngine:
    """An engine and its sequences, and what they wrote since the batch was full."""

    def __init__(self, engine: Engine, sequences: list[EngineSequence]) -> None:
        self.engine, self._sequences = engine, sequences
        self._before = 0

    def fill(self) -> None:
        for sequence in self._sequences:
            self.engine.add(sequence)
        while any(not sequence.output_ids for sequence in self._sequences):
            self.engine.step()
        self._before = self._written()

    @property
    def new_tokens(self) -> int:
        return self._written() - self._before

    @property
    def ended(self) -> bool:
        return any(sequence.finished for sequence in self._sequences)

    def agrees(self, texts: Sequence[Sequence[int]]) -> bool:
        written = ((sequence.output_ids, text) for sequence, text in zip(self._sequences, texts, strict=False))
        return all(list(text[: len(ids)]) == ids for ids, text in written)

    def _written(self) -> int:
        return sum(len(sequence.ids) - sequence.num_prompt for sequence in self._sequences)


class AcceptanceCurve:
    """Measures a pair's cells."""

    def __init__(
        self, pair: RandomPair, plan: CurvePlan, clock: Callable[[], float], seconds_left: Callable[[], float]
    ) -> None:
        """Decode all texts plainly first: they are what the profiles' right candidates are taken from."""
        self._pair, self._plan, self._clock, self._left = pair, plan, clock, seconds_left
        sizes = [batch for batch in plan.batches if batch <= pair.max_batch]
        self._texts = self._plain_texts(max(sizes)) if sizes else []

    def cells(self) -> Iterator[CurveCell]:
        """Yield every cell, profile by profile; those that don't fit memory or time say so."""
        for profile in self._plan.profiles:
            state = self._pair.state()
            for batch in self._plan.batches:
                yield self._cell(profile, batch, state)

    def _plain_texts(self, count: int) -> list[list[int]]:
        some = self._pair.sequences(count, self._plan.tokens)
        engine = self._pair.engine(Mode.PLAIN, count, None, None, self._clock)
        for sequence in some:
            engine.add(sequence)
        while engine.busy:
            engine.step()
        return [list(sequence.output_ids) for sequence in some]

    def _cell(self, profile: AcceptanceProfile, batch: int, state: SpeculationState) -> CurveCell:
        cell = CurveCell(profile.name, profile.acceptance, batch)
        if batch > self._pair.max_batch:
            return replace(cell, skipped=f"no memory: {self._pair.memory_note}")
        ends = self._left() - min(self._plan.cell_s, self._left())
        speedups: list[float] = []
        while len(speedups) < self._plan.runs and cell.texts_agree and self._left() > ends:
            ran = self._run(profile, batch, state, ends)
            if ran is None:
                break
            cell, speedups = ran, [*speedups, *ran.speedups]
        return replace(cell, speedups=tuple(speedups), skipped="" if speedups else "out of time")

    def _run(self, profile: AcceptanceProfile, batch: int, state: SpeculationState, ends: float) -> CurveCell | None:
        """Decode a batch both ways; None: time ended before enough was written."""
        clock = PausableClock(self._clock)
        drafter = ProfileDrafter(self._pair.make_drafter(), profile, self._texts, clock, self._plan.seed)
        trees = self._timed(self._pair.engine(Mode.OPT_TREE, batch, drafter, state, clock), batch)
        plain = self._timed(self._pair.engine(Mode.PLAIN, batch, None, None, clock, second=True), batch)
        both, steps = (trees, plain), list[StepBatch]()

        def over() -> bool:
            return self._left() <= ends or trees.ended or plain.ended

        def keep(index: int, results: StepBatch) -> None:
            if not index:
                steps.append(results)

        seconds = run_interleaved([one.engine for one in both], clock, over, keep)
        if not (trees.ended or plain.ended) and plain.new_tokens < _MIN_SHARE * batch * self._plan.tokens:
            return None
        rates = [one.new_tokens / took for one, took in zip(both, seconds, strict=True)]
        return CurveCell(
            profile.name,
            profile.acceptance,
            batch,
            speedups=(rates[0] / rates[1],),
            tokens_per_step=_mean([results.counts for results in steps]),
            nodes_per_step=_mean([results.tree_nodes for results in steps]),
            decisions=tuple(sorted(Counter(results.decision.value for results in steps).items())),
            texts_agree=all(one.agrees(self._texts) for one in both),
        )

    def _timed(self, engine: Engine, batch: int) -> _TimedEngine:
        """Return an engine whose batch is full: all its sequences have their first token."""
        timed = _TimedEngine(engine, self._pair.sequences(batch, self._plan.tokens))
        timed.fill()
        return timed


def _mean(columns: Sequence[IntArray]) -> float:
    """Return the mean over all steps and sequences."""
    return float(np.concatenate(columns).mean()) if columns else 0.0
