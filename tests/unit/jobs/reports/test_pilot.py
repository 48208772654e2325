from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, sqrt

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
    assert decode_ms([100] * 4, 4, curve) == pytest.approx(50 * step_ms(4))


def test_prefill_is_priced_by_its_tokens() -> None:
    steps = (
        machine_steps([4] * 20) + [MeasuredStep(4, step_ms(4) + 30.0, 1.0, prefilled_tokens=60, with_prefill=True)] * 5
    )
    curve = StepCurve(steps, ROWS_MS, 1.0)
    assert curve.prefill_ms == pytest.approx(0.5)
    pilot = Pilot([PilotRequest(100, 25, tuple(ended(50)))] * 8, steps, [OpenRequest(100, 1, None)] * 8, slots=4)
    assert seconds(predicted(pilot)).estimate == pytest.approx((100 * step_ms(4) + 8 * 25 * 0.5) / 1e3, rel=0.01)


def test_prompts_that_an_earlier_request_has_are_not_computed_again_and_may_have_left_the_memory() -> None:
    steps = machine_steps([4] * 20)
    steps += [MeasuredStep(4, step_ms(4) + 300.0, 1.0, prefilled_tokens=60, with_prefill=True)] * 5
    asked = [PilotRequest(100, 25, tuple(ended(50)))] * 8

    def of(rest: list[OpenRequest]) -> Interval:
        return seconds(predicted(Pilot(asked, steps, rest, slots=4)))

    once, twice = of([OpenRequest(100, 1, None)] * 8), of([OpenRequest(100, 1, None, repeats=True)] * 8)
    assert once.estimate - twice.estimate == pytest.approx(8 * 25 * 5.0 / 1e3)
    assert twice.estimate < once.estimate < twice.high


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


@dataclass(frozen=True)
class Machine:
    """A machine whose pace drifts, and whose largest batches take longer than its calibration says."""

    drift: float  # standard deviation of the logarithm of its pace
    growth: float  # power of the calibrated growth of a step beyond a batch of 32
    prefill_ms: float = 0.2  # per prompt token

    def run(self, texts: Sequence[int], slots: int, draws: random.Random, pace: list[float]) -> list[MeasuredStep]:
        """The steps of texts of these lengths, in order; `pace` holds the logarithm of the pace, and keeps it."""
        waiting, running = list(reversed(texts)), list[int]()
        steps = []
        while waiting or running:
            new = min(slots - len(running), len(waiting))
            running += [waiting.pop() for _ in range(new)]
            pace[0] = 0.98 * pace[0] + sqrt(1 - 0.98**2) * self.drift * draws.gauss(0.0, 1.0)
            ms = self.step_ms(len(running)) + 25 * new * self.prefill_ms
            ms *= exp(pace[0] + 0.05 * draws.gauss(0.0, 1.0))
            steps.append(MeasuredStep(len(running), ms, 1.0, 25 * new, with_prefill=new > 0))
            running = [left - 1 for left in running if left > 1]
        return steps

    def step_ms(self, sequences: int) -> float:
        beyond = max(1.0, (10.0 + sequences) / 42.0)
        return 2 * min(10.0 + sequences, 42.0) * float(beyond**self.growth)


def held(job: Callable[[random.Random], int], limit: int | None, runs: int, rest: int = 105) -> tuple[int, int]:
    """In how many of the runs of pilots of 32 the true tokens, and the true time, lie in their intervals.

    `job` draws the length of a text; those beyond `limit` are cut.
    """
    tokens = times = 0
    for seed in range(runs):
        draws = random.Random(seed)
        machine = Machine(drift=0.08, growth=draws.choice((0.8, 1.0, 1.25)))
        drawn = [job(draws) for _ in range(32 + rest)]
        lengths = drawn if limit is None else [min(length, limit) for length in drawn]
        pace = [machine.drift * draws.gauss(0.0, 1.0)]
        steps = machine.run(lengths[:32], 62, draws, pace)
        true_ms = sum(step.ms for step in machine.run(lengths[32:], 62, draws, pace))
        asked = [
            PilotRequest(100, 25, (PilotText(kept, cut=kept != length),))
            for kept, length in zip(lengths[:32], drawn, strict=False)
        ]
        found = predicted(Pilot(asked, steps, [OpenRequest(100, 1, limit)] * rest, slots=62, rows_ms=ROWS_MS))
        tokens += found.completion_tokens.low <= sum(lengths[32:]) <= found.completion_tokens.high
        times += seconds(found).low <= true_ms / 1e3 <= seconds(found).high
    return tokens, times


JOBS: dict[str, tuple[Callable[[random.Random], int], int | None]] = {
    "free": (lambda draws: int(draws.lognormvariate(4.0, 0.6)) + 1, None),
    "cut": (lambda draws: int(draws.lognormvariate(4.0, 0.6)) + 1, 64),
    "nearly all cut": (lambda draws: draws.randint(1, 96) if draws.random() < 0.03 else 200, 96),
}


def test_intervals_hold_the_truth_in_51_of_60_runs_at_least() -> None:
    runs = [held(*job, runs=20) for job in JOBS.values()]
    assert sum(tokens for tokens, _ in runs) >= 51, "at a level of 90 %"
    assert sum(times for _, times in runs) >= 51, "at a level of 90 %"


@pytest.mark.long
@pytest.mark.parametrize("job", JOBS)
def test_intervals_of_each_kind_of_job_hold_the_truth_in_170_of_200_runs_at_least(job: str) -> None:
    tokens, times = held(*JOBS[job], runs=200)
    assert tokens >= 170
    assert times >= 170


def test_the_same_pilot_gives_the_same_prediction() -> None:
    pilot = a_pilot(range(20, 60), [OpenRequest(100, 2, 64)] * 50)
    assert estimate(pilot) == estimate(pilot)


def test_a_pilot_without_an_answer_predicts_nothing() -> None:
    assert estimate(Pilot((), (), [OpenRequest(100, 1, None)], slots=8)) is None
