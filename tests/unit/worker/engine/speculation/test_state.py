"""Laws of what the planner has learned: a later process continues from it, and a damaged record is ignored."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.unit.worker.engine.harness import sequences
from worker.engine.speculation.draft_costs import DraftTimes
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.state import SpeculationState


def learned() -> SpeculationState:
    """Return a state after a few steps."""
    state = SpeculationState.of(DraftTimes({1: 0.5}, {1: 0.5, 4: 0.8}, 0.01), None)
    forest = Forest(sequences())
    offered = Candidates(np.full((5, 2), 3), np.tile([0.6, 0.3], (5, 1)))
    for step in range(20):
        state.acceptance.learn(forest, forest.roots, offered, np.full(5, 3 + step % 2))
        state.acceptance.learn_discount(2.0, step % 3)
        state.acceptance.forget()
        state.whole.costs.observe_growth(1, [1, 4], 1.6)
        state.whole.costs.observe_gain(0.7)
        state.whole.costs.observe_best_children(0, 0.4, 1.0)
        state.whole.guard.observe(4, 6, 11.0, 10.0, speculated=True)
    return state


def test_a_restored_state_estimates_and_prices_as_the_stored_one() -> None:
    state, forest = learned(), Forest(sequences())
    restored = SpeculationState.of(DraftTimes({1: 0.5}, {1: 0.5}, 0.01), None).restored(
        json.loads(json.dumps(state.record()))
    )
    offered = Candidates(np.full((5, 2), 3), np.tile([0.6, 0.3], (5, 1)))
    now, before = (one.acceptance.of(forest, forest.roots, offered).probabilities for one in (restored, state))
    assert np.allclose(now, before, atol=1e-3)
    assert not np.allclose(now, offered.probabilities, atol=1e-2)
    assert restored.acceptance.tree_discount == pytest.approx(state.acceptance.tree_discount, abs=1e-3)
    for nodes in (1, 4, 9):
        assert restored.whole.costs.first_ms(nodes) == pytest.approx(state.whole.costs.first_ms(nodes))
        assert restored.whole.costs.layer_ms(nodes) == pytest.approx(state.whole.costs.layer_ms(nodes))
    assert restored.whole.costs.gain == pytest.approx(state.whole.costs.gain, abs=1e-5)
    assert restored.whole.costs.best_child_ratio(0) == pytest.approx(state.whole.costs.best_child_ratio(0), abs=1e-5)
    assert restored.record() == state.record()


def damaged(record: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Return the record with another value of one field."""
    return {**record, name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("v", 0),
        ("acceptance", None),
        ("acceptance", {"accepted": [1.0], "expected": [1.0], "trees": [1.0, 1.0]}),
        ("guards", {"whole": {"x": {}}, "free": {}}),
        ("costs", {"whole": 5, "free": {}}),
        ("costs", []),
    ],
)
def test_a_damaged_record_is_ignored_whole(name: str, value: Any) -> None:
    fresh = SpeculationState.of(DraftTimes({1: 0.5}, {1: 0.5}, 0.01), None)
    before = fresh.record()
    assert fresh.restored(damaged(learned().record(), name, value)).record() == before
