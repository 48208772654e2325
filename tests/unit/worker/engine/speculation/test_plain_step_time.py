"""Laws of the pace: plain steps alone say what plain decoding takes, and a slow moment is told from a slow machine."""

from __future__ import annotations

import pytest

from worker.engine.speculation.plain_step_time import PlainStepTimes


def test_a_plain_step_takes_what_plain_steps_took_whatever_forwards_with_trees_do() -> None:
    pace = PlainStepTimes()
    for _ in range(100):
        pace.observe_plain(2, measured_ms=5.0, step_ms=6.0)
        pace.observe_forward(7, measured_ms=6.0, verify_ms=12.0)
    assert pace.plain_ms(2, 5.0) == pytest.approx(6.0)


def test_a_forward_that_takes_what_such_forwards_take_is_no_slow_moment() -> None:
    pace = PlainStepTimes()
    moments = [pace.observe_forward(7, 6.0, 12.0) for _ in range(50)]
    assert moments == pytest.approx([1.0] * 50)


def test_a_slow_moment_counts_as_one_and_a_wild_one_not_for_more_than_half() -> None:
    pace = PlainStepTimes()
    for _ in range(50):
        pace.observe_forward(7, 6.0, 6.0)
    assert pace.observe_forward(7, 6.0, 7.2) == pytest.approx(1.2)
    assert pace.observe_forward(7, 6.0, 600.0) == 1.5


def test_drafts_are_not_judged_before_two_plain_steps_of_their_load_class() -> None:
    pace = PlainStepTimes()
    pace.observe_plain(4, 5.0, 5.0)
    assert pace.unknown(4)
    pace.observe_plain(3, 5.0, 5.0)
    assert not pace.unknown(4)
    assert pace.unknown(8)
