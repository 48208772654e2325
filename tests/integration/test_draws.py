"""10,000 rows of language-like logits draw the same token alone and in a batch, with one thread and with two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from worker.engine.sampling import sampling as sampler
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sampling.sampling import parameters_of

ROWS, BATCH = 10_000, 250
KINDS = [
    Sampling(0.6, top_p=0.95),
    Sampling(1.0, top_p=0.95),
    Sampling(1.5, top_p=0.999),
    Sampling(1.0, top_k=50, top_p=0.9),
    Sampling(1.0),
    Sampling(),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.parametrize("vocab", [49_152, 151_665])
def test_ten_thousand_rows_draw_the_same_alone_and_in_a_batch_with_one_thread_and_two(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    zipf, noise = -torch.arange(1, vocab + 1).float().log(), torch.randn(BATCH, vocab, generator=generator)
    for start in range(0, ROWS, BATCH):
        spread = 0.5 + 2 * torch.rand(BATCH, 1, generator=generator)
        logits = noise * spread + zipf[torch.randperm(vocab, generator=generator)]
        samplings = [replace(KINDS[i % len(KINDS)], key=noise_key(start + i, 0)) for i in range(BATCH)]
        parameters, positions = parameters_of(samplings), np.arange(start, start + BATCH)
        torch.set_num_threads(1)
        drawn = sampler.draw(logits, parameters, positions)
        torch.set_num_threads(2)
        assert (sampler.draw(logits, parameters, positions) == drawn).all(), "two threads"
        for row in range(BATCH):
            alone = sampler.draw(logits[row : row + 1], parameters[row : row + 1], positions[row : row + 1])
            assert alone[0] == drawn[row], f"row {start + row} alone"
