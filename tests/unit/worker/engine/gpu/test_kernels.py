"""The Triton kernels in Triton's interpreter on the CPU: they equal torch for every pattern of visible entries.

Their bits, in half precision, are compared on a GPU (tests/gpu).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip(
    "triton", reason="Triton, whose interpreter runs the GPU's kernels here, has no wheel for this system"
)

from transformers import PreTrainedModel
from triton.runtime.interpreter import GridExecutor

from tests.heads import paged_answers
from tests.models import ARCHITECTURES
from tests.unit.worker.engine.model.test_attention import LATENTS, OPTIONS, check
from tests.unit.worker.engine.model.test_attention import paged as paged_kv
from tests.unit.worker.engine.paged.test_attention import deeper, pages, tree
from worker.engine.gpu import kernels
from worker.engine.gpu.fused_layers import fuse_on_gpu
from worker.engine.gpu.product_parts import parts_of_inputs
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.packed_model import PackedModel
from worker.engine.paged import attention, work
from worker.engine.paged.rows import exact_shape
from worker.engine.segments import Segment, Segments, chain
from worker.planning.devices import FUSED_KERNELS_PER_LAYER

# The interpreter runs a few hundred programs per second, one after the other, so all sizes here are minimal.
SHAPE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
STEPS: dict[str, list[Segment]] = {
    "prompts": [chain(0, 0, [3, 1, 4, 1, 5] * 4, keep_last=True), chain(1, 0, [9, 2], keep_last=True)],
    "one plain row": [chain(0, 20, [5], keep_last=True)],
    "a tree": [tree(0, 20)],
    "below a tree": [deeper(0, 20)],
    "a tree and a long chunk": [tree(0, 20), chain(1, 2, [7, 8, 9] * 3, keep_last=True)],
    "a tree, a short chunk and a plain row": [
        tree(0, 20),
        chain(1, 11, [6, 6, 7], keep_last=True),
        chain(2, 0, [8], keep_last=False),
    ],
}
FUSED = {"qwen2": 2, "qwen3": 2, "mistral": len(STEPS)}  # steps: a bias and head norms see no pattern, a window does


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the GPU's kernels on the CPU, with chunks and tiles so small that tiny texts fill several."""
    monkeypatch.setattr(attention, "gpu_kernels_for", lambda _: kernels)
    monkeypatch.setattr(PackedModel, "_verify", lambda *_: None)  # one forward more, which no law here reads
    monkeypatch.setattr(work, "CHUNK", 16)
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "_ENTRIES", 16)
    monkeypatch.setattr(kernels, "TILE_QUERIES", 16)
    monkeypatch.setattr("worker.engine.paged.rows.TILE_QUERIES", 16)
    monkeypatch.setattr("worker.engine.paged.shape_buckets.BUCKETS", (1, 4, 8))


def network(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made = ARCHITECTURES[architecture](SHAPE)
    made.train(False)
    made.set_attn_implementation(ATTENTION_NAME)
    return made


def packed(made: PreTrainedModel, paged: bool, **given: Any) -> PackedModel:
    return PackedModel(made, slots=3, capacity=64, cpu_kernels=False, paged=paged, **given)


def fused(architecture: str, **given: Any) -> PackedModel:
    made = network(architecture)
    assert fuse_on_gpu(made, kernels)
    return packed(made, True, **given)


@pytest.mark.parametrize("architecture", FUSED)
def test_logits_equal_those_of_dense_attention(architecture: str) -> None:
    plain, ours = packed(network(architecture), False), fused(architecture)
    for name, step in list(STEPS.items())[: FUSED[architecture]]:
        pages(ours).poison_free()  # of a block, a kernel must read only the entries that are written
        assert torch.allclose(ours.forward(step), plain.forward(step), atol=1e-4), name


@pytest.mark.long
@pytest.mark.parametrize("architecture", [name for name, steps in FUSED.items() if steps < len(STEPS)])
def test_logits_of_every_step_equal_those_of_dense_attention(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FUSED, architecture, len(STEPS))
    test_logits_equal_those_of_dense_attention(architecture)


def test_no_bit_of_a_head_depends_on_memory_that_was_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.drafters.head.gpu_kernels_for", lambda _: kernels)
    small = {name: size for name, size in SHAPE.items() if name not in ("vocab_size", "num_hidden_layers")}
    for spoilt, clean in zip(paged_answers(spoilt=True, **small), paged_answers(spoilt=False, **small), strict=True):
        assert torch.equal(spoilt, clean)


def test_logits_and_tapped_states_of_two_layers_equal_those_of_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPE, "num_hidden_layers", 2)
    plain, ours = packed(network("qwen3"), False, tapped=(0, 1)), fused("qwen3", tapped=(0, 1))
    for step in ([chain(0, 0, [3, 1, 4, 1], keep_last=True)], [chain(0, 4, [5], keep_last=True)]):
        assert torch.allclose(ours.forward(step), plain.forward(step), atol=1e-4)
    assert plain.hidden is not None
    assert ours.hidden is not None
    assert torch.allclose(ours.hidden.read(0, 0, 5), plain.hidden.read(0, 0, 5), atol=1e-4)


def test_slices_that_bound_the_memory_of_partial_results_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fused("qwen3")
    step = STEPS["a tree and a long chunk"]
    ours.forward(STEPS["prompts"])
    whole = ours.forward(step)
    monkeypatch.setattr("worker.engine.paged.rows.MAX_PART_BYTES", 5 * 4 * 2 * 8)  # five partial results of two heads
    shape = exact_shape(Segments.of(step), ours.kv)  # type: ignore[arg-type]  # it is paged
    assert shape.slices > 2
    assert torch.equal(ours.forward(step), whole)


def test_unknown_layers_are_not_fused_and_use_packed_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPE, "num_hidden_layers", 2)  # one of each kind
    made = network("gemma3")
    assert not fuse_on_gpu(made, kernels)
    plain, ours = packed(network("gemma3"), False), packed(made, True)
    for step in ([chain(0, 0, [3, 1, 4, 1, 5] * 2, keep_last=True)], [tree(0, 10)]):
        assert torch.allclose(ours.forward(step), plain.forward(step), atol=1e-4)


@pytest.mark.parametrize(("n", "columns", "inputs"), [(1, 5, 16), (17, 40, 48), (70, 33, 96)])
def test_products_equal_those_of_torch(n: int, columns: int, inputs: int) -> None:
    torch.manual_seed(n)
    x, weight, bias = torch.randn(n, inputs), torch.randn(2 * columns, inputs), torch.randn(2 * columns)
    assert torch.allclose(kernels.multiply(x, weight, bias), x @ weight.T + bias, atol=1e-4)
    gate, up = (x @ weight.T).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    assert torch.allclose(kernels.multiply(x, weight, gated=True), expected, atol=1e-4)


@pytest.mark.parametrize("inputs", [100, 900, 2000])
def test_the_parts_of_a_product_add_up(inputs: int) -> None:
    torch.manual_seed(inputs)
    x, weight, bias = torch.randn(3, inputs), torch.randn(7, inputs), torch.randn(7)
    parts = kernels.multiply_apart(x, weight, parts_of_inputs(7, inputs, 1), bias)
    assert (len(parts) > 1) is (inputs > 700)
    assert torch.allclose(parts.sum(0), x @ weight.T + bias, atol=1e-3)


def test_a_layer_launches_as_many_kernels_as_the_forecast_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    run = GridExecutor.__call__

    def counted(self: GridExecutor, *given: Any, **named: Any) -> None:
        launched.append(self.fn)
        run(self, *given, **named)

    counts = []
    for layers in (1, 2):
        monkeypatch.setitem(SHAPE, "num_hidden_layers", layers)
        ours = fused("qwen2")
        with monkeypatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", counted)
            launched.clear()
            ours.forward(STEPS["one plain row"])
        counts.append(len(launched))
    assert counts[1] - counts[0] == FUSED_KERNELS_PER_LAYER


def test_softcap_and_sinks_are_as_the_formula_says() -> None:
    check(paged_kv(in_fp8=False), OPTIONS["both, in a window"], in_fp8=False)


@pytest.mark.parametrize("in_fp8", [False, True])
def test_latents_are_attended_by_parts_of_the_query_heads_as_the_formula_says(
    in_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_WIDE", 16)
    monkeypatch.setattr(kernels, "_split", lambda _: 2)
    check(paged_kv(in_fp8, LATENTS), OPTIONS["both, in a window"], in_fp8, LATENTS)


def test_query_heads_of_latents_are_split_into_equal_parts_that_fill_a_tile() -> None:
    assert [kernels._split(heads) for heads in (128, 40, 16, 12, 20)] == [8, 4, 1, 1, 2]
