"""The compiled kernels compute what torch computes, and a row has the same bits in any batch or tree."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from tests.models import ARCHITECTURES, packed, tiny
from tests.unit.worker.engine.bits import TEXT, check_moves, tree
from tests.unit.worker.engine.harness import all_at_once, decode, drafter, engine, options, outputs, sequences
from worker.engine.cpu.fused_layers import FusedLayers, fuse
from worker.engine.cpu.huge_pages import HugePages
from worker.engine.cpu.kernels import Kernels, kernels
from worker.engine.cpu.kv import CpuKv
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.segments import chain


def compiled(dtype: torch.dtype = torch.float32) -> Kernels:
    ours = kernels(dtype)
    if ours is None:
        pytest.skip("no C compiler here")
    return ours


def quick(architecture: str, dtype: torch.dtype = torch.float32) -> PackedModel:
    compiled(dtype)
    model = tiny(architecture).to(dtype)  # type: ignore[arg-type]
    fuse_layers(model)
    return packed(model, capacity=160)


shared = cache(quick)  # for tests that write what they read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "columns"), [(1, 48, 64), (5, 64, 61), (40, 32, 100), (13, 2, 1)])
def test_packed_products_equal_torch(dtype: torch.dtype, bias: bool, rows: int, inputs: int, columns: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, columns, bias).requires_grad_(False).to(dtype)
    x = torch.randn(rows, inputs).to(dtype)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    ours = PackedLinear([layer], compiled(dtype))(x).double()
    assert (ours - exact).abs().max() <= exact.abs().max() * (2**-8 if dtype is torch.bfloat16 else 2**-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_a_row_has_the_same_bits_alone_and_among_any_rows(dtype: torch.dtype) -> None:
    """More rows than a block has, and more panels than stay in L2 together."""
    torch.manual_seed(0)
    x = torch.randn(29, 64).to(dtype)
    layer = nn.Linear(64, 2600, bias=False).requires_grad_(False).to(dtype)
    plain = PackedLinear([layer], compiled(dtype), floats=True)
    alone = torch.cat([plain(x[row : row + 1]) for row in range(len(x))])
    for rows in (2, 7, 12, 13, 29):
        assert torch.equal(plain(x[:rows]), alone[:rows])


def test_weights_lie_on_whole_cache_lines_and_do_not_overlap() -> None:
    pages = HugePages()
    parts = [pages.empty(size, torch.bfloat16) for size in (3, 40, 1 << 21, 5)]
    for value, part in enumerate(parts):
        assert part.data_ptr() % 64 == 0
        assert not part.any()
        part.fill_(value)
    assert all((part == value).all() for value, part in enumerate(parts))


def test_stacked_layers_equal_separate_ones() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, n).requires_grad_(False) for n in (32, 16, 16)]
    x = torch.randn(7, 32)
    assert torch.allclose(PackedLinear(layers, compiled())(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_layers_of_known_architectures_are_fused(architecture: str) -> None:
    model = tiny(architecture)
    assert fuse(model, compiled())
    assert [type(layer) for layer in model.model.layers] == [FusedLayers]


def test_a_layer_that_is_not_known_stays_as_it_is() -> None:
    model = tiny("gemma3")
    assert not fuse(model, compiled())
    assert len(model.model.layers) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_give_the_logits_of_torch_attention(architecture: str) -> None:
    slow = packed_without_kernels(architecture)
    fast = quick(architecture)
    assert isinstance(fast.kv, CpuKv)
    rows = [chain(0, 0, TEXT[:50], keep_last=True), chain(1, 0, TEXT[:3], keep_last=True)]
    assert torch.allclose(fast.forward(rows), slow.forward(rows), atol=1e-4)
    assert torch.allclose(fast.forward([tree(0, 50)]), slow.forward([tree(0, 50)]), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fused_model_writes_the_same_text(architecture: str) -> None:
    plain, fast = sequences(), sequences()
    at_once = all_at_once(Mode.PLAIN, prefill_rows=64)
    decode(engine(packed_without_kernels(architecture, slots=len(plain)), None, at_once), plain)
    decode(engine(quick(architecture), drafter("suffix"), options(Mode.PAPER)), fast)
    assert outputs(fast) == outputs(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("length", [31, 32, 33, 64])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_a_tree(
    architecture: str, dtype: torch.dtype, length: int
) -> None:
    """Decode the path 1-3-4 of the tree token by token, then as part of the tree beside other sequences."""
    model = shared(architecture, dtype)
    for slot in range(3):
        model.forward([chain(slot, 0, TEXT[:length], keep_last=True)])
    shown = tree(1, length)
    path = [0, 1, 3, 4]
    alone = [
        model.forward([chain(0, length + i, [int(shown.ids[node])], keep_last=True)])[0] for i, node in enumerate(path)
    ]
    others = [chain(0, 0, TEXT[:20], keep_last=True), shown, chain(2, length, TEXT[:17], keep_last=True)]
    together = model.forward(others)[1:-1]
    for i, node in enumerate(path):
        assert torch.equal(together[node], alone[i])


@pytest.mark.parametrize("chunk", [1, 3, 7, 40])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_prompt_read_in_chunks_leaves_the_same_bits(architecture: str, chunk: int) -> None:
    """Rows of one text attend together, each up to its own position; the chunks split them elsewhere."""
    model = shared(architecture, torch.bfloat16)
    whole = model.forward([chain(0, 0, TEXT, keep_last=True)])
    for start in range(0, len(TEXT), chunk):
        pieces = model.forward([chain(1, start, TEXT[start : start + chunk], keep_last=True)])
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    """More threads than processors wait for each other asleep."""
    model = quick("llama", torch.bfloat16)
    steps = [[chain(0, 0, TEXT[:50], keep_last=True), chain(1, 0, TEXT[:3], keep_last=True)], [tree(0, 50)]]
    alone = [model.forward(step).clone() for step in steps]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(model.forward(step), logits) for step, logits in zip(steps, alone, strict=True))
    finally:
        torch.set_num_threads(before)


def test_logits_in_use_are_not_overwritten_and_unused_buffers_are_reused() -> None:
    model = quick("llama")
    held = model.forward([chain(0, 0, TEXT[:9], keep_last=True)])
    numbers, place = held.clone(), held.data_ptr()
    part = held[:, :3]
    del held
    assert model.forward([chain(1, 0, TEXT[:5], keep_last=True)]).data_ptr() != place
    assert torch.equal(part, numbers[:, :3])
    del part
    free = model.forward([chain(1, 0, TEXT[:5], keep_last=True)]).data_ptr()
    assert model.forward([chain(1, 0, TEXT[:7], keep_last=True)]).data_ptr() == free


def test_an_accepted_path_moves_down_in_all_layers() -> None:
    check_moves(quick("llama"))


def packed_without_kernels(architecture: str, slots: int = 4) -> PackedModel:
    model = tiny(architecture)
    model.set_attn_implementation("basic_packed")
    return PackedModel(model, slots=slots, capacity=160, cpu_kernels=False)
