"""Laws of calibration: layer and catch-up times are separated, and measured once per key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.clock import Clock
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_costs import DraftCosts, DraftTimes
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.loading.calibration import calibrate_drafts, measure_drafts

_LAYER_S, _LOOKUP_S, _ROW_S = 4e-3, 5e-4, 1e-4


class Timed:
    """A drafter with a fixed time for a first layer and for further ones, and a time per uncached token."""

    name = "timed"
    forward_free = None

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.read: dict[int, int] = {}
        self.held: set[int] = set()

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        return len(sequence.ids) - self.read.get(id(sequence), 0)

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        if forest.depth[frontier[0]]:
            self.clock.advance(_LOOKUP_S)
            return Candidates(np.zeros((len(frontier), 1), np.int64), np.zeros((len(frontier), 1)))
        rows = sum(self.num_uncached_tokens(forest.sequences[root]) for root in frontier)
        self.held |= {id(forest.sequences[root]) for root in frontier}
        self.read |= {id(forest.sequences[root]): len(forest.sequences[root].ids) for root in frontier}
        self.clock.advance(_LAYER_S + (rows * _ROW_S if rows > len(frontier) else 0.0))
        return Candidates(np.full((len(frontier), 2), 3), np.tile([0.2, 0.5], (len(frontier), 1)))

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """It has no tree."""

    def drop(self, sequence: Sequence) -> None:
        self.held.discard(id(sequence))
        self.read.pop(id(sequence), None)


def test_times_of_a_first_layer_a_further_one_and_catch_up_are_separated() -> None:
    drafter = Timed(Clock())
    times, settled = measure_drafts(drafter, slots=4, capacity=200, clock=drafter.clock)
    assert settled
    assert times.first_ms == pytest.approx(dict.fromkeys((1, 2, 4), _LAYER_S * 1e3))
    assert times.layer_ms == pytest.approx(dict.fromkeys((1, 2, 4), _LOOKUP_S * 1e3))
    assert times.row_ms == pytest.approx(_ROW_S * 1e3)
    assert not drafter.held, "all sequences are dropped"


def test_a_measurement_is_cached_by_its_key(tmp_path: Path) -> None:
    first = calibrate_drafts(SuffixDrafter(), 8, 200, ("one",), tmp_path)
    other = Timed(Clock())
    assert calibrate_drafts(other, 8, 200, ("one",), tmp_path, other.clock).as_json() == first.as_json()
    measured = calibrate_drafts(other, 8, 200, ("other",), tmp_path, other.clock)
    assert measured.first_ms[1] == pytest.approx(_LAYER_S * 1e3)


class Disturbed(Timed):
    """A drafter on a machine with other programs, which leave one after the other until some number of calls."""

    def __init__(self, clock: Clock, calls: int) -> None:
        super().__init__(clock)
        self.calls = calls

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        self.calls -= 1
        self.clock.advance(1e-3 * (2.0 ** max(self.calls / 12, 0) - 1))
        return super().expand(forest, frontier)


def test_a_disturbed_measurement_takes_more_rounds_and_is_not_cached_if_it_never_settles(tmp_path: Path) -> None:
    quiet_soon, never_quiet = Disturbed(Clock(), 40), Disturbed(Clock(), 400)
    times = calibrate_drafts(quiet_soon, 4, 200, ("soon",), tmp_path, quiet_soon.clock)
    assert times.first_ms == pytest.approx(dict.fromkeys((1, 2, 4), _LAYER_S * 1e3))
    calibrate_drafts(never_quiet, 4, 200, ("never",), tmp_path, never_quiet.clock)
    quiet = Timed(Clock())
    later = calibrate_drafts(quiet, 4, 200, ("never",), tmp_path, quiet.clock)
    assert later.first_ms == pytest.approx(dict.fromkeys((1, 2, 4), _LAYER_S * 1e3)), "it measured again"


class Paused(Timed):
    """A drafter that the machine interrupts in a layer of a text that is read already."""

    calls = 0

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        self.calls += 1
        self.clock.advance(0.5 if self.calls == 3 else 0.0)
        return super().expand(forest, frontier)


def test_a_pause_of_the_machine_does_not_make_reading_seem_free() -> None:
    drafter = Paused(Clock())
    times, _ = measure_drafts(drafter, slots=4, capacity=200, clock=drafter.clock)
    assert times.row_ms == pytest.approx(_ROW_S * 1e3)


def test_a_reading_time_that_was_not_measured_is_learned_from_the_first_reading() -> None:
    costs = DraftCosts(DraftTimes({1: 1.0, 2: 1.0}, {1: 1.0, 4: 2.0}, row_ms=0.0))
    costs.observe_growth(100, [2, 4], 43.0)
    assert costs.row_ms == pytest.approx(0.4)


def test_draft_costs_start_from_the_calibration() -> None:
    costs = DraftCosts(DraftTimes({1: 1.0, 2: 1.0}, {1: 1.0, 4: 2.0}, row_ms=0.5))
    assert [costs.layer_ms(nodes) for nodes in (1, 2, 3, 4, 60)] == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert costs.observe_growth(100, [2, 4], 43.0) == pytest.approx(40.0)
    assert costs.row_ms == pytest.approx(0.5 - 0.1 * 0.1, rel=0.05)
    assert costs.first_ms(2) == 1.0, "a step with many uncached tokens does not change layer times"
    assert costs.observe_growth(2, [2, 4], 6.0) == 0.0
    assert costs.first_ms(2) == pytest.approx(1.1)
    assert costs.layer_ms(4) == pytest.approx(2.2)


def test_a_further_layer_may_cost_next_to_nothing() -> None:
    costs = DraftCosts(DraftTimes({1: 1.0}, {1: 0.1}, row_ms=0.0))
    for _ in range(200):
        costs.observe_growth(1, [1], 2.0)
        costs.observe_growth(1, [1, 1, 1], 2.2)
    assert costs.first_ms(1) == pytest.approx(2.0, rel=0.02)
    assert costs.layer_ms(1) == pytest.approx(0.1, rel=0.1)
