"""The kernels that draw on a GPU, in Triton's interpreter: they draw what the CPU draws, from rows of several tiles."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "triton", reason="Triton, whose interpreter runs the GPU's kernels here, has no wheel for this system"
)

from tests.unit.worker.engine.sampling.test_exactness import SAMPLINGS, Rows
from worker.engine.sampling import gpu_kernels, torch_draws
from worker.engine.sampling import sampling as sampler

# The interpreter runs about a thousand operations per second, so rows are tiny and few.
VOCAB = 40


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "native_sampler", lambda _: None)
    monkeypatch.setattr(sampler, "gpu_sampler", lambda _: gpu_kernels)
    monkeypatch.setattr(gpu_kernels, "GROUP", 8)
    monkeypatch.setattr(gpu_kernels, "TILE", 32)
    monkeypatch.setattr(gpu_kernels, "GATHERED", 64)


def agrees_with_torch(rows: Rows, places: list[int], monkeypatch: pytest.MonkeyPatch, *, masked: bool) -> list[int]:
    drawn = rows.draw(places, masked=masked)
    monkeypatch.setattr(sampler, "gpu_sampler", lambda _: None)
    assert rows.draw(places, masked=masked) == drawn
    return drawn


def test_rows_with_penalties_and_masks_draw_what_torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows are broken: a NaN, infinite logits, and masks that allow one token of -inf, or none."""
    rows = Rows(VOCAB, 5 + len(SAMPLINGS), torch.bfloat16)
    rows.logits[0, 35], rows.logits[1], rows.logits[2, 33:] = torch.nan, -torch.inf, torch.inf
    rows.mask[1], rows.mask[3] = torch.tensor([0, 4]), 0
    drawn = agrees_with_torch(rows, list(range(len(rows.samplings)))[::-1], monkeypatch, masked=True)[::-1]
    assert (drawn[0], drawn[1], drawn[3]) == (-1, 34, -1)


def test_a_nucleus_that_does_not_fit_is_found_in_the_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "GATHERED", 2)
    rows = Rows(VOCAB, 4)
    rows.logits *= 0.1
    agrees_with_torch(rows, [3], monkeypatch, masked=False)


def test_scores_of_drafts_are_those_of_torch() -> None:
    rows = Rows(VOCAB, 4)
    ours = sampler.process(rows.logits[3:], rows.parameters[3:])
    assert torch.equal(ours, torch_draws.process(rows.logits[3:], rows.parameters[3:]))
