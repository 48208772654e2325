"""FP8 weights in Triton's interpreter: decoded exactly, with the scales of their columns or blocks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "triton", reason="Triton, whose interpreter runs the GPU's kernels here, has no wheel for this system"
)

from tests.unit.worker.engine.gpu.test_kernels import network, packed, with_kernels  # noqa: F401
from tests.unit.worker.engine.quantization.test_fp8_checkpoints import round_inputs
from tests.unit.worker.engine.quantization.test_quantized_models import STATIC, rows_of, weight_of
from worker.engine.gpu import kernels
from worker.engine.gpu.fused_layers import fuse_on_gpu
from worker.engine.gpu.product_parts import parts_of_inputs
from worker.engine.model.backend import stored_bytes
from worker.engine.quantization.activations import ActivationScheme, rounded_rows
from worker.engine.quantization.weights import QuantizationMethod, QuantizedWeight, quantize
from worker.engine.segments import chain


def test_every_fp8_number_is_decoded_exactly() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    values = bits[bits & 0x7F != 0x7F].view(torch.float8_e4m3fn)[:, None].repeat(1, 16)
    weight = QuantizedWeight(values, torch.ones(1, len(values)))
    x = torch.zeros(1, 16)
    x[0, 3] = 1.0
    assert torch.equal(kernels.multiply(x, weight)[0], values[:, 0].float())


@pytest.mark.parametrize(
    "scheme",
    [ActivationScheme(), ActivationScheme(bound=1.5), ActivationScheme(powers_of_two=True), STATIC],
)
@pytest.mark.parametrize("span", [128, 300])
def test_rows_are_rounded_to_the_bits_of_the_cpu(scheme: ActivationScheme, span: int) -> None:
    x = torch.randn(4, 300) * torch.tensor([1.0, 1e-9, 0.0, 1e4])[:, None]
    x[3, 7] = torch.inf
    values, scales = rounded_rows(x, scheme, span)
    bits, found = kernels.round_rows(x, scheme, span)
    assert torch.equal(found.nan_to_num(-1), scales.nan_to_num(-1))
    real = ~scales.isnan().repeat_interleave(span, 1)[:, :300]
    assert torch.equal(bits.view(torch.float8_e4m3fn).float()[real], values.float()[real])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("form", "inputs"), [("fp8-dynamic", 48), ("fp8-dynamic in blocks", 300)])
def test_products_of_rounded_rows_are_those_of_the_numbers_that_they_stand_for(
    form: str, inputs: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "multiplies_fp8", lambda _: native)
    weight, x = weight_of(form, 40, inputs), torch.randn(70, inputs)
    exact = rows_of(x, weight) @ weight.dequantized(torch.float64).T
    found = kernels.multiply(x, weight, floats=True)
    assert (found - exact).abs().max() <= exact.abs().max() * 2**-20
    assert torch.equal(kernels.multiply(x[:3], weight, floats=True), found[:3])


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
    apart = kernels.multiply_apart(x, weight, parts_of_inputs(40, inputs, 1))
    assert torch.allclose(apart.sum(0), x @ exact.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [QuantizationMethod.FP8, QuantizationMethod.FP8_DYNAMIC])
def test_a_model_with_fp8_weights_equals_the_same_weights_in_torch(method: QuantizationMethod) -> None:
    quantized, plain = network("qwen2"), network("qwen2")
    for model in (quantized, plain):
        quantize(model, method)
    round_inputs(plain)
    assert fuse_on_gpu(quantized, kernels)
    assert stored_bytes(quantized)["float8_e4m3fn"] == sum(
        layer.weight.numel() for name, layer in plain.named_modules() if name.endswith("_proj")
    )
    ours, theirs = packed(quantized, True), packed(plain, False)
    for step in ([chain(0, 0, [3, 1, 4], keep_last=True)], [chain(0, 3, [5], keep_last=True)]):
        assert torch.allclose(ours.forward(step), theirs.forward(step), atol=1e-4)
