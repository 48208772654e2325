"""Shards on GPUs, in Triton's interpreter: a split model has the bits of the whole, whatever way ranks share sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip(
    "triton", reason="Triton, whose interpreter runs the GPU's kernels here, has no wheel for this system"
)

from torch import Tensor
from transformers import PreTrainedModel

from tests.models import ARCHITECTURES
from tests.shards import PeerExchange, ThreadExchange, on_ranks
from tests.unit.worker.engine.gpu.test_kernels import SHAPE, packed, with_kernels  # noqa: F401
from tests.unit.worker.engine.paged.test_attention import tree
from worker.engine.gpu import kernels
from worker.engine.gpu.fused_layers import fuse_on_gpu
from worker.engine.gpu.product_parts import ProductParts, parts_of_columns, parts_of_inputs
from worker.engine.model.architecture import shard_of
from worker.engine.segments import Segment, chain
from worker.engine.shards.exchange import PeerSums
from worker.engine.shards.shard import added, parts_of, tp_sizes_of

Split = dict[int, type[ThreadExchange]]  # how the ranks of each number share sums
FORMS: list[tuple[str, dict[str, Any], Split]] = [
    (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True},
        {2: ThreadExchange, 4: PeerExchange},
    ),
    ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}, {3: PeerExchange}),
]
# Heads, KV heads, size of a head, width, inner width.
SHAPES = {"32B": (40, 8, 128, 5120, 27648), "1.5B": (12, 2, 128, 1536, 8960), "smollm2": (9, 3, 64, 576, 1536)}


def network(form: int) -> PreTrainedModel:
    architecture, shape, _ = FORMS[form]
    torch.manual_seed(0)
    made = ARCHITECTURES[architecture](SHAPE | shape | {"intermediate_size": 48})
    made.train(False)
    return made


def fuse(model: PreTrainedModel) -> None:
    assert fuse_on_gpu(model, kernels, shard_of(model))


def logits(model: PreTrainedModel, steps: list[list[Segment]]) -> Tensor:
    target = packed(model, True)
    return torch.cat([target.forward(step)[:, : model.config.vocab_size] for step in steps])


def hold(form: int, steps: list[list[Segment]]) -> None:
    """Compare the logits of each number of ranks with those of the whole model."""
    model = network(form)
    found = {
        ranks: on_ranks(model, ranks, lambda shard, _: logits(shard, steps), fuse, exchange=exchange, turns=True)[0]
        for ranks, exchange in FORMS[form][2].items()
    }
    fuse(model)
    exact = logits(model, steps)
    for ranks, of_ranks in found.items():
        assert torch.equal(of_ranks, exact), f"on {ranks} ranks"


def test_the_logits_of_a_split_model_have_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.paged.shape_buckets.BUCKETS", (1,))  # no padding
    hold(0, [[chain(0, 0, [3, 1], keep_last=True)]])


@pytest.mark.long
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_the_logits_of_many_rows_and_of_trees_have_the_bits_of_the_whole(form: int) -> None:
    prompts = [chain(0, 0, [3, 1, 4, 1], keep_last=True), chain(1, 0, [9, 2], keep_last=True)]
    hold(form, [prompts, [tree(0, 4), chain(1, 2, [5], keep_last=True)]])


@pytest.mark.parametrize("parts", [3, 4, 6])
def test_sums_that_programs_add_up_are_branches_of_the_tree_of_all_parts(parts: int) -> None:
    torch.manual_seed(parts)
    x, weight = torch.randn(2, 40 * parts), torch.randn(5, 40 * parts)
    found = []
    for wanted in range(1, parts + 1):
        of = ProductParts(unit=40, pieces=1, count=parts, ranks=1, wanted=wanted)
        found.append(kernels.multiply_apart(x, weight, of))
    assert len({len(sums) for sums in found}) > 1, "no program added up parts"
    assert all(torch.equal(added(list(sums)), added(list(found[-1]))) for sums in found)


@pytest.mark.parametrize("name", SHAPES)
def test_ranks_sum_products_in_the_parts_of_the_whole(name: str) -> None:
    heads, kv_heads, size, width, inner = SHAPES[name]
    parts, columns = parts_of(heads, kv_heads), (heads + 2 * kv_heads) * size
    for ranks in tp_sizes_of(heads, kv_heads):
        for inputs in (heads * size, inner):
            whole = parts_of_inputs(width, inputs, parts)
            own = parts_of_inputs(width, inputs // ranks, parts, ranks)
            assert (own.unit, own.pieces, own.count * ranks) == (whole.unit, whole.pieces, whole.count)
        whole, own = (parts_of_columns(columns // by, width, parts, by) for by in (1, ranks))
        assert (own.unit, own.pieces, own.count) == (whole.unit, whole.pieces, whole.count)


def test_one_gpu_writes_and_reads_no_more_sums_than_before_parts_were_fixed() -> None:
    before = {"32B": (2, 4, 8), "1.5B": (4, 4, 8), "smollm2": (1, 1, 4)}  # sums of qkv, o and down
    for name, (heads, kv_heads, size, width, inner) in SHAPES.items():
        parts = parts_of(heads, kv_heads)
        of_qkv = parts_of_columns((heads + 2 * kv_heads) * size, width, parts)
        products = (of_qkv, parts_of_inputs(width, heads * size, parts), parts_of_inputs(width, inner, parts))
        for rows in (1, 64, 512):
            assert all(of.sums(rows) <= most for of, most in zip(products, before[name], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter truncates to bfloat16
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_sum_of_a_norm_is_the_tree_then_the_bias_then_the_residual_rounded_once(
    ranks: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(ranks)
    x, bias, weight = torch.randn(2, 24).to(dtype), torch.randn(24).to(dtype), torch.ones(24, dtype=dtype)
    sums = [torch.randn(8 // ranks, 2, 24) for _ in range(ranks)]
    peers = PeerSums(torch.tensor([own.data_ptr() for own in sums]), 8 // ranks, rank=0)
    exact = (added(list(torch.cat(sums))) + bias.float() + x.float()).to(dtype)
    for parts in (peers, torch.cat(sums)):
        total, normed = kernels.norm(x, parts, weight, 1e-6, bias)
        assert torch.equal(total, exact)
        assert torch.allclose(normed.float(), exact.float() / exact.float().square().mean(1, True).sqrt(), atol=0.02)


def test_a_rank_tells_the_others_that_its_sums_are_written_and_waits_for_theirs() -> None:
    slots, ranks, rank = 4, 3, 1
    pads = [torch.zeros(slots, ranks, dtype=torch.int32) for _ in range(ranks)]
    for row in range(2):
        pads[rank][row] = torch.tensor([1, 0, 1])  # both others have written theirs
    sums = [torch.full((1, 2, 16), float(number)) for number in range(ranks)]
    addresses = [torch.tensor([own.data_ptr() for own in some]) for some in (sums, pads)]
    x = torch.zeros(2, 16)
    peers = PeerSums(addresses[0], 1, rank, addresses[1], slots)
    total, _ = kernels.norm(x, peers, torch.ones(16), 1e-6)
    assert (total == 3.0).all()
    assert not pads[rank].any(), "flags are ready for the next meeting"
    assert all(pad[:2].tolist() == [[0, 1, 0]] * 2 and not pad[2:].any() for pad in (pads[0], pads[2]))
