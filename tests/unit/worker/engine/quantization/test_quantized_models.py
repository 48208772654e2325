"""Quantised weights have their own exact text: a row's bits are those alone, and drafts never change a text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.heads import with_head
from tests.models import packed, tiny
from tests.unit.worker.engine.bits import check_rows, check_threads
from tests.unit.worker.engine.cpu.test_kernels import compiled
from tests.unit.worker.engine.harness import all_at_once, decode, drafter, engine, options, outputs, sequences
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.model.backend import fuse_layers, stored_bytes
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.quantization.activations import ActivationScheme, rounded_rows
from worker.engine.quantization.weights import (
    BLOCK,
    QuantizationMethod,
    QuantizedWeight,
    attach,
    quantize,
    quantized,
)
from worker.engine.sampling.parameters import Sampling

SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.95)
FORMS = ("int8", "fp8", "fp8 in blocks", "fp8-dynamic", "fp8-dynamic in blocks", "fp8-static")
METHODS = ("int8", "fp8", "fp8-dynamic")  # that a model is quantised by
STATIC = ActivationScheme(static_scale=0.01)


def weight_of(form: str, columns: int, inputs: int) -> QuantizedWeight:
    torch.manual_seed(0)
    made = quantized(torch.randn(columns, inputs), QuantizationMethod(form.split()[0]))
    if form == "fp8-static":
        return replace(made, activations=STATIC)
    if "blocks" not in form:
        return made
    scale = torch.rand(-(-inputs // BLOCK), -(-columns // BLOCK)).repeat_interleave(BLOCK, 1)[:, :columns]
    return replace(made, scale=scale.contiguous())


def rows_of(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return what rows become before they are multiplied by a weight, in float64."""
    if weight.activations is None:
        return x.double()
    span = BLOCK if weight.has_blocks else x.shape[1]
    values, scales = rounded_rows(x, weight.activations, span)
    return values.double() * scales.double().repeat_interleave(span, 1)[:, : x.shape[1]]


def layer_of(form: str, columns: int, inputs: int, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(inputs, columns, bias=False).requires_grad_(False).to(dtype)
    attach(layer, weight_of(form, columns, inputs))
    return layer


@cache
def quick(form: str, dtype: torch.dtype = torch.bfloat16) -> PackedModel:
    compiled(dtype)
    model = tiny().to(dtype)  # type: ignore[arg-type]
    quantize(model, QuantizationMethod(form))
    fuse_layers(model)
    return packed(model, capacity=160)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "inputs", "columns"), [(1, 300, 61), (13, 66, 100), (110, 32, 33)])
def test_products_equal_those_of_the_rounded_weights(
    form: str, dtype: torch.dtype, rows: int, inputs: int, columns: int
) -> None:
    weight = weight_of(form, columns, inputs)
    layer = layer_of(form, columns, inputs, dtype)
    x = torch.randn(rows, inputs).to(dtype)
    exact = rows_of(x, weight) @ weight.dequantized(torch.float64).T
    ours = PackedLinear([layer], compiled(dtype), floats=True)(x).double()
    # int8 rounds a row to 1 / 254 of the largest number among 64.
    allowed = x.abs().max() / 254 * weight.dequantized(torch.float64).norm(dim=1).max() * 4 if form == "int8" else 0.0
    assert (ours - exact).abs().max() <= allowed + exact.abs().max() * 2**-20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_of_a_row_has_the_same_bits_alone_and_among_any_rows(form: str, dtype: torch.dtype) -> None:
    plain = PackedLinear([layer_of(form, 2600, 300, dtype)], compiled(dtype), floats=True)
    x = torch.randn(29, 300).to(dtype)
    alone = torch.cat([plain(x[row : row + 1]) for row in range(len(x))])
    for rows in (2, 7, 12, 13, 29):
        assert torch.equal(plain(x[:rows]), alone[:rows])


@pytest.mark.parametrize("form", FORMS)
def test_stacked_and_gated_layers_equal_separate_ones(form: str) -> None:
    layers = [layer_of(form, columns, 320, torch.float32) for columns in (40, 40)]
    x = torch.randn(5, 320)
    apart = [PackedLinear([layer], compiled())(x) for layer in layers]
    assert torch.equal(PackedLinear(layers, compiled())(x), torch.cat(apart, -1))


@pytest.mark.parametrize("scheme", [ActivationScheme(bound=1.5), ActivationScheme(powers_of_two=True)])
def test_scales_are_bounded_and_powers_of_two_where_a_checkpoint_says_so(scheme: ActivationScheme) -> None:
    weight, x = replace(weight_of("fp8", 40, 320), activations=scheme), torch.randn(3, 320)
    layer = nn.Linear(320, 40, bias=False).requires_grad_(False)
    attach(layer, weight)
    rows = rows_of(x, weight)
    exact = rows @ weight.dequantized(torch.float64).T
    assert torch.allclose(PackedLinear([layer], compiled(), floats=True)(x).double(), exact, rtol=1e-4, atol=1e-3)
    if scheme.powers_of_two:
        assert (rounded_rows(x, scheme, 320)[1].log2() % 1 == 0).all()
    else:
        assert rows.abs().max().item() == pytest.approx(1.5)


def test_rows_are_rounded_to_the_nearest_fp8_number_of_their_scale() -> None:
    """The largest number becomes 448, and e4m3 has four significant bits, so a number moves by a sixteenth at most."""
    x = torch.randn(5, 256) * torch.tensor([1e-30, 1e-9, 1.0, 1e5, 0.0])[:, None]
    values, scales = rounded_rows(x, ActivationScheme(), 256)
    assert torch.equal(values.float().abs().amax(1), torch.tensor([0.0, 448.0, 448.0, 448.0, 0.0]))
    apart = (values.float() * scales - x).abs()
    assert (apart <= torch.maximum(x.abs() / 16, scales * 2.0**-10)).all()


@pytest.mark.parametrize("damage", [torch.inf, torch.nan])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_not_finite(form: str, damage: float) -> None:
    """A damaged state must not become a plausible text."""
    x = torch.randn(2, 320)
    x[1, 100] = damage
    found = PackedLinear([layer_of(form, 40, 320, torch.float32)], compiled())(x)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", METHODS)
def test_a_row_has_the_same_bits_alone_in_a_batch_in_a_tree_and_in_any_chunk(form: str, dtype: torch.dtype) -> None:
    check_rows(quick(form, dtype))


@pytest.mark.parametrize("form", METHODS)
def test_bits_do_not_depend_on_the_number_of_threads(form: str) -> None:
    check_threads(quick(form))


@cache
def plain_texts(form: str, sampling: Sampling) -> list[list[int]]:
    some = sequences(sampling=sampling)
    decode(engine(quick(form), None, all_at_once(Mode.PLAIN)), some)
    return outputs(some)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["suffix", "same"])
@pytest.mark.parametrize("form", METHODS)
def test_drafts_never_change_the_text_of_quantised_weights(form: str, kind: str, sampling: Sampling) -> None:
    drafted = sequences(sampling=sampling)
    results = decode(engine(quick(form), drafter(kind), options(Mode.PAPER, max_sequences=2)), drafted[::-1])
    assert outputs(drafted) == plain_texts(form, sampling)
    assert any(result.stats.tree_nodes for result in results), "no tree was verified, so nothing was tested"


@pytest.mark.parametrize("form", METHODS)
def test_a_quantised_head_drafts_for_a_quantised_target_and_changes_no_text(form: str) -> None:
    target = tiny().to(torch.bfloat16)  # type: ignore[arg-type]
    quantize(target, QuantizationMethod(form))
    model, head = with_head(target, quantization=QuantizationMethod(form))
    drafted, plain = sequences(), sequences()
    decode(engine(quick(form), None, options(Mode.PLAIN)), plain)
    results = decode(engine(model, head, options(Mode.PAPER, threshold=0)), drafted)
    assert outputs(drafted) == outputs(plain)
    assert any(result.stats.tree_nodes for result in results), "no tree was verified, so nothing was tested"


@pytest.mark.parametrize(
    ("form", "dtype"), [("int8", "int8"), ("fp8", "float8_e4m3fn"), ("fp8-dynamic", "float8_e4m3fn")]
)
def test_the_bytes_in_memory_are_counted_by_dtype(form: str, dtype: str) -> None:
    model = tiny().to(torch.bfloat16)  # type: ignore[arg-type]
    quantize(model, QuantizationMethod(form))
    panel = compiled(torch.bfloat16).panel
    sizes = {
        name: -(-layer.out_features // panel) * panel * layer.in_features
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and (form == "int8" or name != "lm_head")
    }
    embedding_bytes = model.get_input_embeddings().weight.nbytes
    fuse_layers(model)
    assert stored_bytes(model)[dtype] == sum(sizes.values())
    assert stored_bytes(model)["bfloat16"] >= embedding_bytes
