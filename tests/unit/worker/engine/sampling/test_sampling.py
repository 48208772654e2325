"""Laws of sampling: draws follow the processed softmax exactly, and depend on nothing but logits, key and position."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.goodness_of_fit import chi_square_p, kolmogorov_p
from tests.models import TableModel
from tests.unit.worker.engine.harness import finish, options
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.engine import Engine
from worker.engine.options import Mode
from worker.engine.sampling import sampling as sampler
from worker.engine.sampling import torch_draws
from worker.engine.sampling.native import native_sampler
from worker.engine.sampling.parameters import Sampling, noise_key, noise_keys
from worker.engine.sampling.sampling import argmax, gumbel_scores, parameters_of, topk
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, 0.5, -0.5, 1.9])
PROCESSED = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=1.3, top_k=3),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=0.8, min_p=0.3),
    Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05),
]
DRAWS = 20_000


def draw(
    logits: Tensor, samplings: list[Sampling], positions: Iterable[int], rows: IntArray | None = None
) -> list[int]:
    drawn = sampler.draw(logits, parameters_of(samplings), np.array(list(positions)), rows)
    tokens: list[int] = drawn.tolist()
    return tokens


def process(logits: Tensor, samplings: list[Sampling]) -> Tensor:
    return sampler.process(logits, parameters_of(samplings))


def noise(samplings: list[Sampling], positions: list[int], tokens: Tensor) -> Tensor:
    keys = noise_keys(parameters_of(samplings), np.array(positions))
    return torch_draws.gumbel(torch.from_numpy(keys.view(np.int64)).unsqueeze(1), tokens)


def by_transformers(sampling: Sampling, logits: Tensor) -> Tensor:
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    scores: Tensor = LogitsProcessorList(warpers)(torch.LongTensor(len(logits), 1), logits.clone())
    return scores.softmax(-1)


@pytest.mark.parametrize("sampling", PROCESSED)
def test_processed_logits_equal_transformers_warpers(sampling: Sampling) -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)) * 3
    ours = process(logits, [sampling] * 50).softmax(-1)
    assert torch.allclose(ours, by_transformers(sampling, logits), atol=1e-6)


def test_rows_with_different_filters_do_not_touch_each_other() -> None:
    logits = torch.randn(len(PROCESSED), 40, generator=torch.Generator().manual_seed(2)) * 3
    together = process(logits, PROCESSED)
    alone = torch.cat([process(logits[i : i + 1], [s]) for i, s in enumerate(PROCESSED)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("sampling", PROCESSED)
def test_draws_follow_the_processed_law(sampling: Sampling) -> None:
    rows = LOGITS.expand(DRAWS, -1)
    drawn = draw(rows, [sampling] * DRAWS, range(DRAWS))
    expected = by_transformers(sampling, LOGITS.unsqueeze(0))[0].double().numpy()
    counts = np.bincount(drawn, minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    law = expected[possible] / expected[possible].sum()
    assert chi_square_p(counts[possible], law * DRAWS) > 1e-3


def test_noise_is_standard_gumbel_and_does_not_repeat() -> None:
    samplings = [Sampling(1.0, key=noise_key(seed, 0)) for seed in range(50)]
    values = noise(samplings, [3] * 50, torch.arange(400)).flatten().numpy()
    assert kolmogorov_p(np.exp(-np.exp(-values.astype(np.float64)))) > 1e-3
    assert len(np.unique(values)) == values.size


@pytest.mark.parametrize("other", [noise_key(1, 1), noise_key(2, 0)], ids=["choice", "seed"])
def test_choices_and_seeds_have_different_noise(other: int) -> None:
    def of(key: int, position: int) -> Tensor:
        return noise([Sampling(1.0, key=key)], [position], torch.arange(2000))

    base = of(noise_key(1, 0), 5)
    assert torch.equal(base, of(noise_key(1, 0), 5))
    for different in (of(other, 5), of(noise_key(1, 0), 6)):
        assert abs(np.corrcoef(base.numpy(), different.numpy())[0, 1]) < 0.1


class EveryToken:
    """Drafts every token below every node, to a depth, so that each draw of the target finds a child."""

    forward_free = None
    name = "every-token"

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        return Candidates(np.tile(np.arange(4), (len(frontier), 1)), np.full((len(frontier), 4), 0.25))

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Do nothing: it has no state."""

    def drop(self, sequence: Sequence) -> None:
        """Do nothing: it has no state."""


@cache
def two_step_logits(text: tuple[int, ...]) -> Tensor:
    """Check a joint law in which the second token depends on the first."""
    return torch.tensor([0.3, 1.0, -0.5, 0.2]) * (1 + text[-1])


def two_step_engine(drafter: Drafter | None) -> Engine:
    """Return an engine on `two_step_logits` that admits all prompts in one step and verifies trees of two layers."""
    mode = Mode.PLAIN if drafter is None else Mode.PAPER
    chosen = options(mode, max_sequences=64, prefill_rows=256, nodes=25, max_depth=2)
    return Engine(TableModel(two_step_logits), drafter, chosen, CostModel({1: 1.0}))


@pytest.mark.parametrize("drafter", [None, EveryToken(), SuffixDrafter()], ids=["plain", "full trees", "suffix"])
def test_two_tokens_follow_the_joint_law_with_any_draft(drafter: Drafter | None) -> None:
    running = two_step_engine(drafter)
    count = 800
    some = [Sequence(i, [2, 0], 2, 3, Sampling(1.0, key=noise_key(i, 0))) for i in range(count)]
    finish(running, some)
    counts = np.zeros((4, 4))
    for sequence in some:
        first, second, _ = sequence.output_ids
        counts[first, second] += 1
    first_law = two_step_logits((2, 0)).softmax(-1)
    joint = torch.stack([first_law[i] * two_step_logits((0, i)).softmax(-1) for i in range(4)]).double().numpy()
    assert chi_square_p(counts.flatten(), (joint / joint.sum() * count).flatten()) > 1e-3


@pytest.mark.skipif(native_sampler(torch.device("cpu")) is None, reason="there is no C compiler")
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0])
def test_compiled_draws_are_the_draws_of_torch(spread: float) -> None:
    logits = torch.randn(len(PROCESSED), 3000, generator=torch.Generator().manual_seed(2)) * spread
    processed = torch_draws.process(logits, parameters_of(PROCESSED))  # no key changes it
    for position in range(60):
        samplings = [replace(s, key=noise_key(position, row)) for row, s in enumerate(PROCESSED)]
        positions = [position] * len(samplings)
        by_torch = noise(samplings, positions, torch.arange(3000)).add_(processed).argmax(-1)
        assert draw(logits, samplings, positions) == by_torch.tolist()


def test_draws_read_rows_of_a_strided_view_in_any_order() -> None:
    """The stride is larger than a row; greedy and filtered rows are among them."""
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(3))[:, :211]
    some = [Sampling(), Sampling(temperature=0.7), Sampling(temperature=1.3), Sampling(temperature=0.7, top_k=5)]
    places = np.array([7, 0, 3, 3])
    for position in range(40):
        samplings = [replace(s, key=noise_key(position, row)) for row, s in enumerate(some)]
        for chosen in (slice(0, 4), slice(1, 3)):
            here, positions = samplings[chosen], [position] * len(samplings[chosen])
            alone = zip(places[chosen], here, strict=True)
            copied = [draw(logits[[place]].clone(), [s], [position])[0] for place, s in alone]
            assert draw(logits, here, positions, places[chosen]) == copied


def test_approximate_noise_is_accurate_to_a_thousandth() -> None:
    samplings, positions, tokens = (
        [Sampling(temperature=1.0, key=key) for key in range(8)],
        list(range(8)),
        torch.arange(500),
    )
    exact = noise(samplings, positions, tokens)
    rough = gumbel_scores(torch.zeros(8, 500), parameters_of(samplings), np.array(positions), tokens)
    assert (rough - exact).abs().max() < 2e-3


def test_a_nucleus_larger_than_the_first_search_is_complete() -> None:
    flat = torch.zeros(1, 2000) - torch.arange(2000) * 1e-4
    kept = process(flat, [Sampling(temperature=1.0, top_p=0.7)]).isfinite().sum()
    assert int(kept) == int((by_transformers(Sampling(temperature=1.0, top_p=0.7), flat) > 0).sum())


def test_argmax_and_topk_equal_those_of_torch() -> None:
    for columns in (8, 61, 4099):
        scores = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) * 4
        assert argmax(scores).tolist() == scores.argmax(-1).tolist()
        places, probabilities = topk(scores, 8)
        expected = scores.softmax(-1).topk(8)
        assert places.tolist() == expected.indices.tolist()
        torch.testing.assert_close(probabilities, expected.values.double(), rtol=1e-5, atol=1e-7)


def test_the_first_of_equal_scores_is_chosen() -> None:
    assert argmax(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])).tolist() == [1]
    assert topk(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 2)[0].tolist() == [[1, 2]]


@pytest.mark.parametrize("sampling", [Sampling(), *PROCESSED])
@pytest.mark.parametrize("vocab", [5, 64, 1000])
@pytest.mark.parametrize("by_torch", [False, True])
def test_a_row_with_a_nan_draws_nothing_and_changes_no_other_row(
    sampling: Sampling, vocab: int, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_torch:
        monkeypatch.setattr("worker.engine.sampling.sampling.native_sampler", lambda device: None)
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(1))
    expected = draw(logits, [sampling] * 6, range(6))
    broken = logits.clone()
    broken[1], broken[3, 0], broken[5, -1] = torch.nan, torch.nan, torch.nan
    drawn = draw(broken, [sampling] * 6, range(6))
    assert drawn == [expected[0], -1, expected[2], -1, expected[4], -1]
    assert argmax(broken).tolist()[1::2] == [-1, -1, -1]
    assert not topk(broken, 3)[1].isnan().any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_logits_draw_a_token(value: float) -> None:
    logits = torch.zeros(1, 70)
    logits[0, 65:] = value
    for sampling in (Sampling(), *PROCESSED):
        (token,) = draw(logits, [sampling], [0])
        assert 0 <= token < 70
        assert (token >= 65) == (value > 0)
