"""FP8 weights in Triton's interpreter: decoded exactly, with the scales of their columns or blocks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "triton", reason="Triton, whose interpreter runs the GPU's kernels here, has no wheel for this system"
)

from tests.unit.worker.engine.gpu.test_kernels import network, packed, with_kernels  # noqa: F401
from tests.unit.worker.engine.quantization.test_quantized_models import weight_of
from worker.engine.gpu import kernels
from worker.engine.gpu.fused_layers import fuse_on_gpu
from worker.engine.model.backend import stored_bytes
from worker.engine.quantization.weights import QuantizationMethod, QuantizedWeight, quantize
from worker.engine.segments import chain


def test_every_fp8_number_is_decoded_exactly() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    values = bits[bits & 0x7F != 0x7F].view(torch.float8_e4m3fn)[:, None].repeat(1, 16)
    weight = QuantizedWeight(values, torch.ones(1, len(values)))
    x = torch.zeros(1, 16)
    x[0, 3] = 1.0
    assert torch.equal(kernels.multiply(x, weight)[0], values[:, 0].float())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("form", "inputs"), [("fp8", 48), ("fp8 in blocks", 300)])
def test_products_with_fp8_weights_equal_those_with_the_weights_that_they_stand_for(
    form: str, inputs: int, gated: bool
) -> None:
    weight = weight_of(form, 40, inputs)
    weight = QuantizedWeight(weight.values, weight.scale / 100)
    exact, x = weight.dequantized(torch.float32), torch.randn(3, inputs)
    assert torch.allclose(
        kernels.multiply(x, weight, gated=gated), kernels.multiply(x, exact, gated=gated), rtol=1e-4, atol=1e-4
    )
    assert torch.allclose(kernels.multiply_apart(x, weight).sum(0), x @ exact.T, rtol=1e-4, atol=1e-4)


def test_a_model_with_fp8_weights_equals_the_same_weights_in_torch() -> None:
    quantized, plain = network("qwen2"), network("qwen2")
    for model in (quantized, plain):
        quantize(model, QuantizationMethod.FP8)
    assert fuse_on_gpu(quantized, kernels)
    assert stored_bytes(quantized)["float8_e4m3fn"] == sum(
        layer.weight.numel() for name, layer in plain.named_modules() if name.endswith("_proj")
    )
    ours, theirs = packed(quantized, True), packed(plain, False)
    for step in ([chain(0, 0, [3, 1, 4], keep_last=True)], [chain(0, 3, [5], keep_last=True)]):
        assert torch.allclose(ours.forward(step), theirs.forward(step), atol=1e-4)
