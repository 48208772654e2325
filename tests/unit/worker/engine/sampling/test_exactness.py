"""Laws of exactness: a draw depends on its own row: not on the batch, the threads, the dtype or the implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.engine.sampling import sampling as sampler
from worker.engine.sampling import torch_draws
from worker.engine.sampling.native import native_sampler
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sampling.penalties import NONE_SEEN, adjustments_of
from worker.engine.sampling.sampling import parameters_of

SAMPLINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.6, top_p=0.95),
    Sampling(1.0, top_k=50, top_p=0.9),
    Sampling(1.5, min_p=0.05),
    Sampling(0.9, top_k=7),
    Sampling(1e-6, top_p=0.5),
    Sampling(1.0, top_k=10**9, top_p=0.999),
    Sampling(3.0, top_k=1, top_p=0.01, min_p=1.0),
    Sampling(1.0, logit_bias=((3, 100.0), (5, -100.0)), presence_penalty=2.0, frequency_penalty=-2.0),
    Sampling(0.0, logit_bias=((7, 100.0),), repetition_penalty=1e-20),
]
compiled = pytest.mark.skipif(native_sampler(torch.device("cpu")) is None, reason="there is no C compiler")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def zipf(rows: int, vocab: int, exponent: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = -exponent * torch.arange(1, vocab + 1).float().log()
    return torch.stack([scores[torch.randperm(vocab, generator=generator)] for _ in range(rows)])


def test_a_nucleus_is_the_same_alone_and_in_a_batch_with_any_number_of_threads(threads: int) -> None:
    """torch's `sum` splits by shape and threads: with two threads it moved the end of row 1 of these."""
    logits, nucleus = zipf(8, 49152, exponent=0.5, seed=0), Sampling(1.0, top_p=0.95)
    together = sampler.process(logits, np.repeat(nucleus.record, 8))
    for row in (1, 6):
        assert torch.equal(sampler.process(logits[row : row + 1], nucleus.record)[0], together[row])


class Rows:
    """Rows with every kind of parameters, some with penalties, over language-like logits; drawn together or alone."""

    def __init__(self, vocab: int, count: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(vocab)
        self.logits = (torch.randn(count, vocab, generator=generator) * 2 + zipf(count, vocab, 1.0, vocab)).to(dtype)
        self.samplings = [replace(SAMPLINGS[i % len(SAMPLINGS)], key=noise_key(i, 0)) for i in range(count)]
        self.parameters, self.positions = parameters_of(self.samplings), np.arange(count) * 3
        tokens = np.array([1, 3, 5, 8])
        self.seen = [(tokens, tokens % 3) if s.adjusted else NONE_SEEN for s in self.samplings]
        self.mask = torch.randint(-(2**31), 2**31, (count, -(-vocab // 32)), generator=generator).int()

    def draw(self, rows: list[int], *, masked: bool = False) -> list[int]:
        adjustments = adjustments_of([self.samplings[i].bias for i in rows], [self.seen[i] for i in rows])
        mask = self.mask[rows] if masked else None
        places = np.array(rows)
        drawn = sampler.draw(self.logits, self.parameters[rows], self.positions[rows], places, adjustments, mask)
        tokens: list[int] = drawn.tolist()
        return tokens


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_alone_what_it_draws_in_any_batch(dtype: torch.dtype, masked: bool, threads: int) -> None:
    rows = Rows(3001, 33, dtype)
    together = rows.draw(list(range(33)), masked=masked)
    assert [rows.draw([i], masked=masked)[0] for i in range(33)] == together
    assert rows.draw(list(range(33))[::-2], masked=masked) == together[::-2]


@compiled
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [33, 1000])
def test_compiled_draws_with_penalties_and_mask_equal_torch(
    vocab: int, dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(vocab, 66, dtype)
    ours = rows.draw(list(range(66)), masked=masked)
    monkeypatch.setattr(sampler, "native_sampler", lambda _: None)
    assert rows.draw(list(range(66)), masked=masked) == ours


@compiled
def test_compiled_scores_are_those_of_torch_bit_for_bit() -> None:
    rows = Rows(2000, 44)
    sampled = rows.parameters["temperature"] > 0
    logits, parameters = rows.logits[torch.from_numpy(sampled)], rows.parameters[sampled]
    assert torch.equal(sampler.process(logits, parameters), torch_draws.process(logits, parameters))
    adjustments = adjustments_of([s.bias for s in rows.samplings], rows.seen)
    ours = sampler.adjust(rows.logits, rows.parameters, adjustments)
    assert torch.equal(ours, torch_draws.adjust(rows.logits, rows.parameters, adjustments))


def test_bfloat16_logits_draw_what_their_float32_values_draw() -> None:
    rows = Rows(3001, 33, torch.bfloat16)
    drawn = rows.draw(list(range(33)))
    rows.logits = rows.logits.float()
    assert rows.draw(list(range(33))) == drawn


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS[:5])
def test_only_tokens_that_the_mask_allows_are_drawn(
    sampling: Sampling, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_torch:
        monkeypatch.setattr(sampler, "native_sampler", lambda _: None)
    logits = torch.zeros(5, 70)
    logits[1:, :60], logits[4, 69] = 30.0, torch.nan
    mask = torch.tensor([[-1, -1, -1], [0, 0, 1 << 5], [-(2**31), 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.int32)
    logits[2, 31] = -torch.inf
    drawn = sampler.draw(logits, np.repeat(sampling.record, 5), np.arange(5), mask=mask)
    assert drawn[0] == sampler.draw(logits[:1], sampling.record, np.arange(1))[0], "a mask of ones changed the draw"
    assert drawn[1:].tolist() == [69, 31, -1, -1]


@pytest.mark.parametrize("by_torch", [False, True])
def test_totals_of_logprobs_are_the_same_in_any_batch(
    by_torch: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_torch:
        monkeypatch.setattr(sampler, "native_sampler", lambda _: None)
    logits = zipf(6, 3001, exponent=1.0, seed=1)
    logits[3], logits[4, 7], logits[5, 9] = -torch.inf, torch.inf, torch.nan
    together = sampler.log_totals(logits)
    assert torch.allclose(together, logits.double().logsumexp(-1), rtol=1e-11, atol=1e-11, equal_nan=True)
    for row in range(3):
        assert sampler.log_totals(logits[row : row + 1])[0] == together[row]
