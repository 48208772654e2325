"""Laws of the cost model: curves never fall, outliers move little, drift is followed, plain steps measured alone."""

from __future__ import annotations

import numpy as np
import pytest

from worker.engine.speculation.cost_model import CostModel, PlainStepTimes, load_class


def costs() -> CostModel:
    return CostModel({1: 10.0, 8: 12.0, 16: 20.0}, entry_ms=0.001)


def test_the_first_step_of_a_load_after_a_prefill_is_passed_over_once() -> None:
    times = PlainStepTimes()
    assert times.passes_over(3)
    assert not times.passes_over(4), "the same load: it must become known"
    times.observe_plain(8, calibrated_ms=5.0, step_ms=5.0)
    assert not times.passes_over(7), "it is known"
    assert times.passes_over(16)


def test_the_curve_passes_through_its_points_and_is_extended_beyond_them() -> None:
    assert costs().step_ms([1, 8, 12, 16, 24]).tolist() == [10.0, 12.0, 16.0, 20.0, 28.0]


def test_attended_entries_are_priced_one_by_one() -> None:
    assert costs().step_ms(8, 3000.0) == pytest.approx(15.0)


def test_more_rows_never_cost_less_even_if_measured_so() -> None:
    noisy = CostModel({1: 30.0, 2: 10.0, 4: 12.0, 8: 40.0})
    assert (np.diff(noisy.step_ms(np.arange(1, 30))) >= 0).all()


def test_one_point_is_a_flat_curve() -> None:
    assert CostModel({1: 5.0}).step_ms(9) == 5.0


def test_steps_show_the_drift_of_the_machine() -> None:
    model = costs()
    for _ in range(200):
        model.observe(8, 0.0, 24.0)
    assert model.step_ms(8) == pytest.approx(24.0, rel=0.01)
    assert model.step_ms(1) == pytest.approx(20.0, rel=0.15), "drift learned at one size holds at the others"


def test_an_error_at_one_size_is_corrected_there_alone() -> None:
    model = costs()
    for _ in range(400):
        model.observe(16, 0.0, 26.0)
        model.observe(1, 0.0, 10.0)
    assert model.step_ms(16) / model.step_ms(1) == pytest.approx(2.6, rel=0.05)


@pytest.mark.parametrize("outlier", [1000.0, 0.01])
def test_one_outlier_moves_a_price_by_less_than_a_twentieth(outlier: float) -> None:
    model = costs()
    for _ in range(30):
        model.observe(1, 0.0, 10.0)
    before = model.step_ms([1, 8, 16])
    model.observe(1, 0.0, outlier)
    assert np.abs(model.step_ms([1, 8, 16]) / before - 1).max() < 0.055


def test_what_was_measured_survives_json_and_what_was_learned_does_not() -> None:
    model = costs()
    for _ in range(50):
        model.observe(8, 0.0, 50.0)
    again = CostModel.from_json(model.as_json())
    assert again.step_ms([1, 8, 30], 100.0).tolist() == costs().step_ms([1, 8, 30], 100.0).tolist()


def test_batches_of_similar_size_share_a_load_class() -> None:
    assert [load_class(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 64)] == [0, 1, 2, 2, 3, 3, 4, 4, 6]


def test_forwards_with_trees_do_not_change_what_a_plain_step_takes() -> None:
    times = PlainStepTimes()
    for _ in range(100):
        times.observe_plain(2, calibrated_ms=5.0, step_ms=6.0)
        times.observe_forward(7, calibrated_ms=6.0, verify_ms=12.0)
    assert times.plain_ms(2, 5.0) == pytest.approx(6.0)


def test_a_forward_of_usual_time_shows_no_slowdown() -> None:
    times = PlainStepTimes()
    slowdowns = [times.observe_forward(7, 6.0, 12.0) for _ in range(50)]
    assert slowdowns == pytest.approx([1.0] * 50)


def test_a_slowdown_is_measured_and_clipped_at_one_half() -> None:
    times = PlainStepTimes()
    for _ in range(50):
        times.observe_forward(7, 6.0, 6.0)
    assert times.observe_forward(7, 6.0, 7.2) == pytest.approx(1.2)
    assert times.observe_forward(7, 6.0, 600.0) == 1.5


def test_drafts_are_not_judged_before_two_plain_steps_of_their_load_class() -> None:
    times = PlainStepTimes()
    times.observe_plain(4, 5.0, 5.0)
    assert times.unknown(4)
    times.observe_plain(3, 5.0, 5.0)
    assert not times.unknown(4)
    assert times.unknown(8)
