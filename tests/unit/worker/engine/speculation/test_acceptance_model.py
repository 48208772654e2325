"""Laws of the acceptance model: probabilities become frequencies, per depth and sampling, verified or not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.worker.engine.harness import sequences
from worker.engine.sampling.parameters import Sampling
from worker.engine.speculation.acceptance_model import AcceptanceModel
from worker.engine.speculation.draft_tree import Candidates, Forest


def forest(sampling: Sampling | None = None) -> Forest:
    return Forest(sequences(sampling=sampling)[:1])


def offered(*probabilities: float) -> Candidates:
    return Candidates(np.arange(len(probabilities))[None], np.array([probabilities]))


def taught(truth: float, promised: float, steps: int = 600) -> AcceptanceModel:
    """Return a model that has learned from drafts of probability `promised`, which the target drew with `truth`."""
    rng, acceptance = np.random.default_rng(0), AcceptanceModel()
    for _ in range(steps):
        drawn = np.array([0 if rng.random() < truth else 9])
        acceptance.learn(forest(), np.array([0]), offered(promised), drawn)
        acceptance.forget()
    return acceptance


@pytest.mark.parametrize(("truth", "promised"), [(0.9, 0.3), (0.2, 0.7), (0.5, 0.5), (0.05, 0.6)])
def test_a_probability_becomes_the_frequency_seen_before(truth: float, promised: float) -> None:
    valued = taught(truth, promised).of(forest(), np.array([0]), offered(promised))
    assert valued.probabilities[0, 0] == pytest.approx(truth, abs=0.06)


def test_without_samples_the_drafter_s_probability_stays() -> None:
    assert AcceptanceModel().of(forest(), np.array([0]), offered(0.6, 0.0)).probabilities.tolist() == [[0.6, 0.0]]


def test_greedy_samples_do_not_change_sampled_probabilities() -> None:
    sampled = taught(0.1, 0.7).of(forest(Sampling(1.0)), np.array([0]), offered(0.7))
    assert sampled.probabilities[0, 0] == pytest.approx(0.7)


def test_a_change_of_the_text_is_followed_within_two_hundred_steps() -> None:
    rng, acceptance = np.random.default_rng(1), taught(0.9, 0.6, 500)
    for _ in range(200):
        acceptance.learn(forest(), np.array([0]), offered(0.6), np.array([0 if rng.random() < 0.2 else 9]))
        acceptance.forget()
    assert acceptance.of(forest(), np.array([0]), offered(0.6)).probabilities[0, 0] < 0.6


def test_nodes_that_the_target_did_not_reach_teach_nothing() -> None:
    acceptance = AcceptanceModel()
    acceptance.learn(forest(), np.array([0]), offered(0.7), np.array([-1]))
    assert acceptance.as_json() == AcceptanceModel().as_json()


def test_no_probability_reaches_one() -> None:
    assert taught(1.0, 0.9).of(forest(), np.array([0]), offered(0.99)).probabilities.max() < 1.0
