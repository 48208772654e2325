"""Prepacked and fused layers compute what the layers they replace computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import ARCHITECTURES, packed, tiny
from tests.unit.worker.engine.harness import decode, drafter, engine, options, outputs, sequences
from worker.engine.linear import PackedLinear, StackedLinear, prepack
from worker.engine.options import Mode


class Attention(nn.Module):
    """Three layers on one input, as models have them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(32, 32, bias),
            nn.Linear(32, 16, bias),
            nn.Linear(32, 16, bias),
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_stacked_layers_equal_separate_ones(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    module = Attention(bias).requires_grad_(False)
    inputs = [torch.randn(1, rows, 32) for _ in range(3)]
    expected = [module(x) for x in inputs]
    assert prepack(module) == 3
    assert isinstance(module.q_proj, StackedLinear)
    for x, outs in zip(inputs, expected, strict=True):
        for ours, theirs in zip(module(x), outs, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_second_call_on_the_same_tensor_sees_what_has_been_written_into_it() -> None:
    module = Attention(False).requires_grad_(False)
    reference = [layer.weight.clone() for layer in (module.q_proj, module.k_proj, module.v_proj)]
    prepack(module)
    x = torch.randn(2, 32)
    module(x)
    x.mul_(2.0)
    for ours, weight in zip(module(x), reference, strict=True):
        assert torch.allclose(ours, x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prepacked_model_writes_the_same_text(architecture: str) -> None:
    plain, fast = sequences(), sequences()
    decode(engine(packed(tiny(architecture)), None, options(Mode.PLAIN)), plain)
    model = tiny(architecture)
    assert prepack(model) == 2 * 7 + 1  # seven layers a block, and the head
    assert isinstance(model.lm_head, PackedLinear)
    decode(engine(packed(model), drafter("suffix"), options(Mode.PAPER)), fast)
    assert outputs(fast) == outputs(plain)
