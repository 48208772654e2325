"""Laws of the running mean: it starts as the arithmetic mean and then follows, and outliers are clipped."""

from __future__ import annotations

import pytest

from worker.engine.speculation.running_mean import RunningMean


def test_the_first_samples_count_alike_and_later_ones_by_the_weight() -> None:
    mean = RunningMean(0.1)
    for sample in (1.0, 2.0, 6.0):
        mean.add(sample)
    assert mean.value == pytest.approx(3.0)
    for _ in range(20):
        mean.add(3.0)
    mean.add(13.0)
    assert mean.value == pytest.approx(4.0)


def test_a_settled_mean_moves_by_the_weight_from_the_first_sample_on() -> None:
    mean = RunningMean.settled(0.05, 2.0)
    mean.add(4.0)
    assert mean.value == pytest.approx(2.1)


def test_an_outlier_is_clipped_to_a_factor_of_the_mean_and_the_first_sample_is_not() -> None:
    mean = RunningMean(0.1, 1.0)
    assert mean.clipped(100.0, 1.5) == 100.0
    mean.add(2.0)
    assert [mean.clipped(sample, 1.5) for sample in (0.1, 2.5, 100.0)] == [pytest.approx(4 / 3), 2.5, 3.0]
