"""Laws of the guard: losses are bounded, gains are kept, and a blocked strategy is tried again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.clock import Clock
from tests.models import TableModel
from tests.unit.worker.engine.harness import decode, options, sequences
from worker.drafters.mixed import MixedDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.engine import Engine
from worker.engine.options import Mode
from worker.engine.segments import IntArray, Segment
from worker.engine.sequence import Sequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.decision import Decision
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.regret_guard import RegretGuard
from worker.engine.speculation.state import SpeculationState

PLAIN_MS = 10.0


def run(guard: RegretGuard, steps: int, sequences: int, tokens: float, step_ms: float) -> tuple[float, int]:
    """Run steps that speculate unless blocked; return the tokens lost and the number of steps that speculated."""
    lost, tried = 0.0, 0
    for _ in range(steps):
        speculates = not guard.blocked(sequences)
        tried += speculates
        if speculates:
            guard.observe(sequences, int(tokens), step_ms, PLAIN_MS, speculated=True)
            lost += sequences * step_ms / PLAIN_MS - tokens
        else:
            guard.observe(sequences, sequences, PLAIN_MS, PLAIN_MS, speculated=False)
    return lost, tried


@pytest.mark.parametrize("sequences", [1, 4, 32])
@pytest.mark.parametrize("step_ms", [10.5, 13.0, 19.0, 90.0])
def test_drafts_that_are_never_accepted_cost_at_most_a_hundredth(sequences: int, step_ms: float) -> None:
    lost, tried = run(RegretGuard(), 8_000, sequences, sequences, step_ms)
    once = sequences * (step_ms / PLAIN_MS - 1)
    assert 0 < lost <= 0.01 * 8_000 * sequences + 2 * once + 8
    assert 0 < tried < 4_000


@pytest.mark.parametrize("sequences", [1, 32])
def test_lookups_that_never_find_drafts_cost_at_most_three_thousandths(sequences: int) -> None:
    guard, looked = RegretGuard(), [False]
    for _ in range(20_000):
        looked.append(not guard.blocked(sequences))
        guard.observe(sequences, sequences, PLAIN_MS + 0.3 * looked[-1], PLAIN_MS, speculated=False)
    assert 0.03 * sum(looked) * sequences <= 0.003 * 20_000 * sequences + 20
    assert any(looked[-1000:]), "later text may repeat itself"


def test_rare_drafts_pay_for_the_lookups_between_them() -> None:
    guard = RegretGuard()
    for step in range(2_000):
        assert not guard.blocked(1)
        if step % 50:
            guard.observe(1, 1, PLAIN_MS + 0.2, PLAIN_MS, speculated=False)
        else:
            guard.observe(1, 4, 12.0, PLAIN_MS, speculated=True)


def test_speculation_that_pays_is_never_blocked() -> None:
    _, tried = run(RegretGuard(), 1000, 4, 8, 12.0)
    assert tried == 1000


def test_a_strategy_that_lost_with_few_sequences_gets_a_small_trial_with_more() -> None:
    lost, won = RegretGuard(), RegretGuard()
    run(lost, 200, 2, 2, 13.0)
    run(won, 200, 2, 4, 13.0)
    assert won.tokens(4) > 4 * lost.tokens(4) > 0
    assert lost.tokens(1) == won.tokens(1), "with fewer it may still pay"


@pytest.mark.parametrize("sequences", [8, 64])
def test_a_large_batch_tries_nothing_before_smaller_ones_have_gained(sequences: int) -> None:
    cold, lost, won = RegretGuard(), RegretGuard(), RegretGuard()
    run(lost, 200, 2, 2, 13.0)
    run(won, 200, 1, 2, 13.0)
    assert cold.blocked(sequences)
    assert lost.blocked(sequences)
    assert not won.blocked(sequences)


def test_a_large_batch_that_runs_long_enough_finds_out_that_drafts_pay() -> None:
    _, tried = run(RegretGuard(), 1000, 32, 64, 12.0)
    assert tried > 950


def test_a_restored_guard_decides_as_the_one_that_was_stored() -> None:
    guard, restored = RegretGuard(), RegretGuard()
    for batch_size, tokens in ((1, 3), (4, 8), (32, 32)):
        run(guard, 100, batch_size, tokens, 13.0)
    restored.restore(json.loads(json.dumps(guard.record())))
    for batch_size in (1, 2, 4, 8, 32, 64):
        assert restored.blocked(batch_size) == guard.blocked(batch_size)
        assert restored.tokens(batch_size) == pytest.approx(guard.tokens(batch_size), abs=1e-3)
        assert restored.gain(batch_size) == pytest.approx(guard.gain(batch_size), abs=1e-5)
        assert restored.time_price(batch_size, PLAIN_MS) == pytest.approx(guard.time_price(batch_size, PLAIN_MS))


def test_old_gains_do_not_pay_for_long_losses_and_new_gains_are_noticed() -> None:
    guard = RegretGuard()
    run(guard, 5000, 2, 6, 12.0)
    lost, _ = run(guard, 2000, 2, 2, 15.0)
    assert lost < 0.01 * 4000 + 8 + 2
    _, tried = run(guard, 400, 2, 6, 12.0)
    assert tried > 200


def test_the_price_of_time_follows_the_number_of_sequences_and_the_speedup() -> None:
    guard = RegretGuard()
    assert guard.time_price(8, PLAIN_MS) == 8 / PLAIN_MS
    run(guard, 200, 8, 16, 12.0)
    assert guard.time_price(8, PLAIN_MS) == pytest.approx(16 / 12.0, rel=0.01)
    assert guard.time_price(5, PLAIN_MS) == pytest.approx(10 / 12.0, rel=0.01), "fewer sequences write fewer tokens"


def test_each_load_class_has_a_bucket_of_its_own() -> None:
    guard = RegretGuard()
    run(guard, 200, 32, 32, 20.0)
    assert guard.blocked(32)
    assert not guard.blocked(1)


def test_pauses_of_the_machine_do_not_block_what_gains_on_average() -> None:
    guard = RegretGuard()
    for step in range(400):
        assert not guard.blocked(1)
        guard.observe(1, 2, 80.0 if step % 5 == 4 else 12.0, PLAIN_MS, speculated=True)


def test_one_pause_of_the_machine_counts_as_at_most_two_and_a_half_steps() -> None:
    guard = RegretGuard()
    guard.observe(1, 1, 5000.0, PLAIN_MS, speculated=True)
    assert guard.as_json()["1"]["credit_tokens"] == pytest.approx(4.0 - 1.5, abs=0.01)


def test_the_more_drafts_gain_the_rarer_are_plain_steps_on_purpose() -> None:
    counting = TimedTable(lambda text: torch.eye(61)[2 + len(text) % 3])
    chosen, costs = options(Mode.OPT_TREE, probe_every=4, max_context=3000), CostModel({1: 2.0, 64: 2.1})
    some = sequences([[2, 3, 4, 2, 3, 4]], max_tokens=1000)
    results = decode(Engine(counting, SuffixDrafter(), chosen, costs, clock=counting.clock), some)
    assert np.mean([r.stats.emitted_tokens for r in results]) > 2
    probes = [r.stats.step for r in results if r.stats.decision is Decision.PROBE]
    assert probes[:3] == [1, 2, 3], "plain steps come first: one passed over after the prefill, two to compare with"
    apart = [later - earlier for earlier, later in itertools.pairwise(probes)]
    assert len(apart) >= 3, "probes never end"
    assert min(apart[2:]) > 8 * 4, "where drafts gain much, probes are rare"


def test_the_forward_free_part_still_drafts_when_the_network_does_not_pay() -> None:
    counting = TimedTable(lambda text: torch.eye(61)[2 + len(text) % 3])
    mixed = MixedDrafter(LateReader(counting.clock, row_s=5e-3), SuffixDrafter())
    some = sequences([[2, 3, 4, 2, 3, 4]] * 2, max_tokens=200)
    costs = CostModel({1: 2.0, 4: 2.1, 64: 8.0})
    results = decode(Engine(counting, mixed, options(Mode.OPT_TREE), costs, clock=counting.clock), some)
    late = [r.stats for r in results[len(results) // 2 :]]
    assert sum(n.drafter == "suffix" for n in late) > len(late) / 2
    assert np.mean([n.emitted_tokens for n in late]) > 1.5


def test_what_was_learned_outlives_the_engine() -> None:
    state = SpeculationState()
    never = TimedTable(lambda text: torch.eye(61)[3 + len(text) % 5])
    clock = never.clock
    for _ in range(2):
        chosen = options(Mode.OPT_TREE, max_sequences=4)
        running = Engine(never, LateReader(clock), chosen, CostModel({1: 2.0}), state, clock=clock)
        decode(running, sequences(max_tokens=40))
    bucket = state.as_json()["accounts"]["whole"]["4"]
    assert bucket["steps"] > 40


@dataclass
class TimedTable(TableModel):
    """A target whose forward advances a clock by `forward_s`."""

    clock: Clock = field(default_factory=Clock)
    forward_s: float = 2e-3

    def forward(self, segments: Seq[Segment]) -> torch.Tensor:
        self.clock.advance(self.forward_s)
        return super().forward(segments)


class LateReader:
    """A drafter that must read each sequence before it can draft, and whose drafts are never accepted."""

    name = "late"
    forward_free = None

    def __init__(self, clock: Clock, row_s: float = 2e-4) -> None:
        self.clock = clock
        self.read: dict[object, int] = {}
        self.row_s = row_s
        self.rows = 0

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        return len(sequence.ids) - self.read.get(sequence.key, 0)

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        for root in frontier[forest.depth[frontier] == 0].tolist():
            sequence = forest.sequences[root]
            self.rows += self.num_uncached_tokens(sequence)
            self.clock.advance(self.num_uncached_tokens(sequence) * self.row_s)
            self.read[sequence.key] = len(sequence.ids)
        return Candidates(np.full((len(frontier), 1), 60), np.full((len(frontier), 1), 0.6))

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Keep no state."""

    def drop(self, sequence: Sequence) -> None:
        """Keep no state."""


def test_a_draft_that_never_gained_anything_is_tried_on_few_sequences() -> None:
    texts = [list(range(2, 52))] * 32
    some = sequences(texts, max_tokens=16)
    never = TimedTable(lambda text: torch.eye(61)[3 + len(text) % 5])
    late = LateReader(never.clock)
    chosen = options(Mode.OPT_TREE, max_sequences=32, prefill_rows=2000)
    running = Engine(never, late, chosen, CostModel({1: 2.0}), clock=never.clock)
    decode(running, some)
    assert 0 < late.rows < 32 * 50 / 3


def test_a_lookup_that_finds_nothing_counts_as_a_plain_step() -> None:
    """The measured time of a lookup is small; the rest of the step is a plain step."""
    target = TimedTable(lambda text: torch.eye(61)[2 + (len(text) ** 2 // 7) % 59], forward_s=4e-2)
    some = sequences([[2, 3, 4, 5]], max_tokens=30)
    costs = CostModel({1: 40.0, 64: 44.0})
    found = decode(Engine(target, Blank(target.clock), options(Mode.OPT_TREE), costs, clock=target.clock), some)
    lookups = [r.stats for r in found if r.stats.decision is Decision.NO_CANDIDATES]
    assert Decision.GUARD not in {result.stats.decision for result in found}
    assert len(lookups) > len(found) / 2
    lookups_ms = [n.step_ms - (n.plain_step_ms or 0.0) for n in lookups[:-1]]  # the last token needs no lookup
    assert lookups_ms == pytest.approx([Blank.lookup_s * 1e3] * len(lookups_ms))


class Blank(LateReader):
    """A fast lookup that never finds drafts."""

    lookup_s = 1e-4
    lookups = 0

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        return 0

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        self.lookups += 1
        self.clock.advance(self.lookup_s)
        return Candidates(np.zeros((len(frontier), 1), np.int64), np.zeros((len(frontier), 1)))


def test_nothing_is_tried_beside_a_prefill() -> None:
    """The time of a step with prefill rows does not show what drafts gain."""
    some = sequences([[2, 3, 4, 5], list(range(2, 50))], max_tokens=12)
    chosen = options(Mode.OPT_TREE, prefill_rows=4)
    never = TimedTable(lambda text: torch.eye(61)[3 + len(text) % 5])
    blank = Blank(never.clock)
    engine = Engine(never, blank, chosen, CostModel({1: 2.0}), clock=never.clock)
    for sequence in some:
        engine.add(sequence)
    while any(sequence.cached < sequence.num_prompt - 1 for sequence in some):
        beside = [r.stats for r in engine.step()]
        assert all(n.decision is not Decision.TREE and n.decision is not Decision.NO_CANDIDATES for n in beside)
    assert blank.lookups == 0
    while engine.busy:
        engine.step()
    assert blank.lookups > 0


def test_drafts_that_pay_are_used_beside_a_prefill() -> None:
    counting = TimedTable(lambda text: torch.eye(61)[2 + len(text) % 3])
    first, late = sequences([[2, 3, 4, 2, 3, 4], [5, 6, 7] * 20], max_tokens=190)
    chosen, costs = options(Mode.OPT_TREE, prefill_rows=4), CostModel({1: 2.0, 64: 2.1})
    engine = Engine(counting, SuffixDrafter(), chosen, costs, clock=counting.clock)
    engine.add(first)
    for _ in range(30):
        engine.step()
    engine.add(late)
    beside = [r.stats.decision for _ in range(10) for r in engine.step()]
    assert not late.output_ids
    assert Decision.TREE in beside
