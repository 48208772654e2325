"""An acceptance profile says how often a draft is right, and its probabilities stay true when it is tilted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.errors import InvalidValue
from tests.unit.worker.bench.acceptance.pairs import PROFILE, RECORDED
from worker.bench.acceptance.profile import (
    FOLDER,
    names,
    profile_of,
    rate_of_length,
    rates_of_positions,
    read_recorded,
)

UNIFORM = (np.arange(4000) + 0.5) / 4000


def test_an_untilted_profile_draws_ranks_as_often_as_recorded() -> None:
    ranks, _ = PROFILE.at(0).on_path(UNIFORM)
    shares = np.bincount(ranks, minlength=4) / len(ranks)
    assert shares == pytest.approx(RECORDED.frequencies, abs=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_the_first_candidate_of_a_tilted_profile_is_right_at_its_rate(rate: float) -> None:
    ranks, _ = PROFILE.with_rates("x", (rate,)).at(3).on_path(UNIFORM)
    assert (ranks == 0).mean() == pytest.approx(rate, abs=1e-3)


def test_probabilities_that_were_true_stay_true_when_the_profile_is_tilted() -> None:
    # In PROFILE, nodes with equal probabilities have the target's token at each rank as often as they say.
    ranks, shapes = PROFILE.with_rates("x", (0.8,)).at(0).on_path(UNIFORM)
    for shape in np.unique(shapes.round(9), axis=0):
        alike = ranks[(shapes.round(9) == shape).all(axis=1)]
        assert [(alike == rank).mean() for rank in range(3)] == pytest.approx(shape, abs=0.01)


def test_a_better_draft_has_no_better_second_candidates() -> None:
    def second(rate: float) -> float:
        ranks, _ = PROFILE.with_rates("x", (rate,)).at(0).on_path(UNIFORM)
        return float((ranks == 1).sum() / (ranks > 0).sum())

    recorded = RECORDED.frequencies
    assert second(0.9) == pytest.approx(recorded[1] / (1 - recorded[0]), abs=0.01)
    assert second(recorded[0] / 2) == pytest.approx(second(0.9) / 2, abs=0.01)


def test_the_rate_of_chains_reproduces_their_length() -> None:
    assert rate_of_length(1.91, 2) == pytest.approx((-1 + (4 * 1.91 - 3) ** 0.5) / 2)
    assert rates_of_positions((0.8, 0.4, 0.3)) == pytest.approx((0.8, 0.5, 0.75))


def test_every_packaged_profile_can_be_read_and_names_its_source() -> None:
    for name in names():
        assert 0.0 < profile_of(name).acceptance < 1.0
    stored = json.loads((FOLDER / "published.json").read_text())
    assert all(one["source"] and one["pair"] for one in stored["profiles"].values())


@pytest.mark.parametrize("text", ["1.2", "-0.1", "no-such-pair", "nan", ""])
def test_an_acceptance_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidValue, match=repr(text)):
        profile_of(text)


def test_a_damaged_profile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pair.json"
    depth = {"counts": [1, 1], "shapes": [[[0.5]], []], "off_path": []}
    file.write_text(json.dumps({"format": "basic-acceptance-1", "name": "pair", "depths": [depth]}))
    with pytest.raises(InvalidValue, match="a class of ranks has no samples"):
        read_recorded(file)
    with pytest.raises(InvalidValue, match="is not an acceptance profile"):
        profile_of(str(tmp_path / "missing.json"))
