"""A drafter by a profile is right as often as the profile says, and no text depends on it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.worker.bench.acceptance.pairs import PROFILE, RECORDED, TOKENS, decode_by, texts_of, tiny_pair
from worker.bench.acceptance.drafter import PausableClock
from worker.bench.acceptance.pair import RandomPair
from worker.bench.acceptance.recorder import ProfileRecorder


@pytest.fixture(scope="module")
def pair() -> RandomPair:
    return tiny_pair()


@pytest.fixture(scope="module")
def texts(pair: RandomPair) -> list[list[int]]:
    return texts_of(pair, TOKENS)


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_texts_are_those_of_plain_decoding_at_any_acceptance(
    pair: RandomPair, texts: list[list[int]], rate: float
) -> None:
    written, accepted, depths = decode_by(pair, PROFILE.with_rates("x", (rate,)), texts, nodes=12)
    assert written == texts
    if rate == 1.0:
        assert (accepted == depths).all(), "all are right"
        assert accepted.max() == pair.options.max_depth
    if rate == 0.0:
        assert depths.min() > 0
        assert not accepted.any(), "none is right"


def test_acceptance_is_what_the_profile_says_within_the_error_of_sampling(pair: RandomPair) -> None:
    texts = texts_of(pair, 60)
    _, accepted, _ = decode_by(pair, PROFILE.with_rates("x", (0.7,)), texts, nodes=1)
    error = (0.7 * 0.3 / len(accepted)) ** 0.5
    assert abs(accepted.mean() - 0.7) < 3 * error
    assert error < 0.05


def test_a_recording_of_a_drafter_by_a_profile_has_the_ranks_of_the_profile(
    pair: RandomPair, texts: list[list[int]]
) -> None:
    recorders: list[ProfileRecorder] = []

    def recorded(drafter: object) -> ProfileRecorder:
        recorders.append(ProfileRecorder(drafter, texts))  # type: ignore[arg-type]
        return recorders[0]

    written, _, _ = decode_by(pair, PROFILE, texts, nodes=12, wrap=recorded)
    assert written == texts
    first = recorders[0].as_json("again", {})["depths"][0]
    counts = np.array(first["counts"])
    assert (np.abs(counts / counts.sum() - RECORDED.frequencies) < 3 * (0.25 / counts.sum()) ** 0.5).all()
    assert all(len(some) <= 16 for some in first["shapes"])


def test_a_paused_clock_stands_still() -> None:
    now = [0.0]
    clock = PausableClock(lambda: now[0])
    now[0] = 2.0
    with clock.paused():
        now[0] = 5.0
    assert clock() == 2.0
