"""Draws on a GPU: each row draws what the CPU draws, alone and in any batch, with the vocabularies of real models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.worker.engine.sampling.test_exactness import SAMPLINGS
from worker.engine.sampling import sampling as sampler
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sampling.sampling import parameters_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [49_152, 152_064])
def test_rows_draw_what_the_cpu_draws_in_batches_of_any_size(vocab: int, dtype: torch.dtype) -> None:
    count, generator = 256, torch.Generator().manual_seed(vocab)
    logits = (torch.randn(count, vocab, generator=generator) * 3).to(dtype)
    there = logits.cuda()
    kinds = [s for s in SAMPLINGS if not s.adjusted] + [Sampling(0.6, top_p=0.95)] * 4
    for position in range(10):
        samplings = [replace(kinds[i % len(kinds)], key=noise_key(i, 0)) for i in range(count)]
        parameters, positions = parameters_of(samplings), np.full(count, position)
        together = sampler.draw(there, parameters, positions)
        assert together.tolist() == sampler.draw(logits, parameters, positions).tolist()
        for some in (np.array([position]), np.arange(position, count, 5)):
            assert sampler.draw(there, parameters[some], positions[some], some).tolist() == together[some].tolist()
