"""Laws of the cost model: curves never fall, one wild sample moves little, and drift of the machine is followed."""

from __future__ import annotations

import numpy as np
import pytest

from worker.engine.cost_model import CostModel


def costs() -> CostModel:
    return CostModel({1: 10.0, 8: 12.0, 16: 20.0}, {1: 10.0, 4: 16.0})


def test_curves_pass_through_their_points_and_go_on_beyond_them() -> None:
    assert costs().verify_ms(np.array([1, 8, 12, 16, 24])).tolist() == [10.0, 12.0, 16.0, 20.0, 28.0]


def test_more_rows_never_cost_less_even_if_measured_so() -> None:
    noisy = CostModel({1: 30.0, 2: 10.0, 4: 12.0, 8: 40.0}, {1: 10.0})
    assert (np.diff(noisy.verify_ms(np.arange(1, 30))) >= 0).all()


def test_one_point_is_a_flat_curve() -> None:
    assert CostModel({1: 5.0}, {1: 7.0}).plain_step_ms(9) == 7.0


def test_plain_steps_of_jobs_say_how_far_the_machine_has_drifted() -> None:
    model = costs()
    for _ in range(20):
        model.observe_plain(4, 32.0)
    assert model.plain_step_ms(4) == pytest.approx(32.0)
    assert model.plain_step_ms(1) == pytest.approx(20.0), "drift learned at one batch size holds at the others"


def test_one_wild_sample_moves_the_mean_by_little() -> None:
    model = costs()
    for _ in range(30):
        model.observe_plain(1, 10.0)
    model.observe_plain(1, 1000.0)
    assert model.plain_step_ms(1) < 11.1


def test_the_curves_are_plain_json() -> None:
    assert costs().as_json()["verify_ms_by_rows"] == {"1": 10.0, "8": 12.0, "16": 20.0}
