from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from jobs.reports.pilot.estimate import Estimate, Interval, Pilot, estimate
from jobs.reports.pilot.lengths import LengthCurve, OpenRequest, PilotRequest, PilotText
from jobs.reports.pilot.step_times import MeasuredStep, StepCurve, decode_ms

ROWS_MS = {rows: 10.0 + rows for rows in (1, 2, 4, 8, 16, 32, 64)}


def ended(*tokens: int) -> list[PilotText]:
    return [PilotText(count, cut=False) for count in tokens]


def step_ms(sequences: int) -> float:
    """Times of the machine of these tests: as calibrated, twice over."""
    return 2 * (10.0 + sequences)


def machine_steps(batches: Sequence[int], emitted: float = 1.0) -> list[MeasuredStep]:
    return [MeasuredStep(batch, step_ms(batch), emitted) for batch in batches]


def a_pilot(
    lengths: Sequence[int], rest: Sequence[OpenRequest], *, slots: int = 8, power_w: float | None = None
) -> Pilot:
    requests = [PilotRequest(100, 25, (PilotText(tokens, cut=False),)) for tokens in lengths]
    steps = machine_steps([1, 2, 4, 8] * 20)
    return Pilot(requests, steps, rest, slots, rows_ms=ROWS_MS, power_w=power_w)


def predicted(pilot: Pilot) -> Estimate:
    found = estimate(pilot)
    assert found is not None
    return found


def seconds(found: Estimate) -> Interval:
    assert found.seconds is not None
    return found.seconds


def test_without_cut_texts_the_mean_length_is_the_mean_of_the_texts() -> None:
    curve = LengthCurve(ended(3, 5, 5, 11))
    assert curve.mean(None) == pytest.approx(6.0)
    assert curve.mean(1_000) == pytest.approx(6.0)
    assert curve.mean(5) == pytest.approx((3 + 5 + 5 + 5) / 4)


def test_a_text_that_was_cut_counts_as_longer_where_the_limit_is_higher() -> None:
    curve = LengthCurve([*ended(10, 30), PilotText(20, cut=True), PilotText(20, cut=True)])
    assert curve.mean(20) == pytest.approx((10 + 20 * 3) / 4)
    assert curve.mean(30) > (10 + 30 + 20 + 20) / 4
    assert LengthCurve([PilotText(20, cut=True)]).mean(50) == 50, "all that is known is that they are longer"


def test_drawn_lengths_have_the_mean_of_the_curve() -> None:
    curve = LengthCurve([*ended(3, 5, 8, 40), PilotText(20, cut=True)])
    drawn = [curve.quantile((n + 0.5) / 1_000, 25) for n in range(1_000)]
    assert sum(drawn) / 1_000 == pytest.approx(curve.mean(25), rel=0.01)


def test_the_tokens_of_a_job_like_its_pilot_are_those_of_the_pilot() -> None:
    requests = [PilotRequest(size, size // 4, (PilotText(size // 2, cut=False),)) for size in range(40, 440, 4)]
    rest = [OpenRequest(request.size, 1, None) for request in requests]
    found = predicted(Pilot(requests, (), rest, slots=8))
    assert found.prompt_tokens.estimate == pytest.approx(sum(r.prompt_tokens for r in requests), rel=0.02)
    assert found.completion_tokens.estimate == pytest.approx(sum(t.tokens for r in requests for t in r.texts))
    assert found.seconds is None, "nothing was measured"


def test_answers_that_grow_with_their_prompts_are_predicted_for_prompts_of_another_mix() -> None:
    short = [PilotRequest(100 + n, 25, tuple(ended(20))) for n in range(48)]
    long = [PilotRequest(900 + n, 225, tuple(ended(200))) for n in range(48)]
    found = predicted(Pilot([*short, *long], (), [OpenRequest(950, 1, None)] * 10, slots=8))
    assert found.completion_tokens.estimate == pytest.approx(2_000, rel=0.01)


def test_the_time_of_equal_texts_is_that_of_full_batches() -> None:
    found = predicted(a_pilot([50] * 16, [OpenRequest(100, 1, None)] * 80, slots=8))
    assert seconds(found).estimate == pytest.approx(80 / 8 * 50 * step_ms(8) / 1e3, rel=0.01)


def test_a_batch_larger_than_the_pilots_takes_as_long_as_the_calibration_says() -> None:
    found = predicted(a_pilot([50] * 16, [OpenRequest(100, 1, None)] * 320, slots=32))
    assert seconds(found).estimate == pytest.approx(320 / 32 * 50 * step_ms(32) / 1e3, rel=0.01)


def test_a_calibration_that_other_programs_disturbed_does_not_make_rows_dearer_with_the_batch() -> None:
    curve = StepCurve(machine_steps([8] * 20), {8: 10.0, 16: 100.0}, 1.0)
    assert curve.step_ms(16) == pytest.approx(2.2 * step_ms(8))


def test_accepted_draft_tokens_shorten_the_job() -> None:
    curve = StepCurve(machine_steps([4] * 20, emitted=2.0), ROWS_MS, 1.0)
    assert decode_ms([100] * 4, 0, 4, curve) == pytest.approx(50 * step_ms(4))


def test_prefill_is_priced_by_its_tokens() -> None:
    steps = (
        machine_steps([4] * 20) + [MeasuredStep(4, step_ms(4) + 30.0, 1.0, prefilled_tokens=60, with_prefill=True)] * 5
    )
    curve = StepCurve(steps, ROWS_MS, 1.0)
    assert curve.prefill_ms == pytest.approx(0.5)
    assert decode_ms([1], 100, 4, curve) == pytest.approx(curve.step_ms(1) + 50.0)


def test_two_workers_take_half_the_time_and_the_same_energy() -> None:
    rest = [OpenRequest(100, 1, None)] * 160
    one = a_pilot([50] * 16, rest, power_w=70.0)
    two = Pilot(one.requests, one.steps, rest, one.slots, 2, ROWS_MS, power_w=70.0)
    alone, together = predicted(one), predicted(two)
    assert seconds(together).estimate == pytest.approx(seconds(alone).estimate / 2)
    assert alone.joules is not None
    assert together.joules is not None
    assert alone.joules.estimate == pytest.approx(70.0 * seconds(alone).estimate)
    assert together.joules.estimate == pytest.approx(alone.joules.estimate)


def test_without_a_power_there_is_no_energy() -> None:
    assert predicted(a_pilot([50] * 16, [OpenRequest(100, 1, None)])).joules is None


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draws = random.Random(7)
    rest = [OpenRequest(100, 1, None)] * 400
    held = 0
    for _ in range(16):
        lengths = [int(draws.lognormvariate(4.0, 0.6)) + 1 for _ in range(432)]
        interval = predicted(a_pilot(lengths[:32], rest)).completion_tokens
        held += interval.low <= sum(lengths[32:]) <= interval.high
    assert held >= 13, "of 16, at a level of 90 %"


def test_the_same_pilot_gives_the_same_prediction() -> None:
    pilot = a_pilot(range(20, 60), [OpenRequest(100, 2, 64)] * 50)
    assert estimate(pilot) == estimate(pilot)


def test_a_pilot_without_an_answer_predicts_nothing() -> None:
    assert estimate(Pilot((), (), [OpenRequest(100, 1, None)], slots=8)) is None
