"""Split over any number of ranks, a model has the bits that it has on one. The ranks are threads of this process."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import packed, tiny
from tests.shards import Absent, ThreadChannel, on_ranks
from tests.unit.worker.engine.bits import TEXT
from tests.unit.worker.engine.cpu.test_kernels import compiled
from tests.unit.worker.engine.harness import decode, engine, greedy_and_sampled, options, outputs
from worker.drafters.model import ModelDrafter
from worker.engine.errors import RankLost
from worker.engine.kv.fp8 import store_kv_in_fp8
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.parallel.leader_model import LeaderModel
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import Segment, chain
from worker.engine.shards.shard import Shard, added, parts_of, tp_sizes_of

FORMS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True}, (2, 4)),
    ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 84}, (2, 3)),
    ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 102}, (3,)),
]


def whole(form: int, dtype: torch.dtype) -> tuple[PreTrainedModel, tuple[int, ...]]:
    compiled(dtype)
    architecture, shape, ranks = FORMS[form]
    return tiny(architecture, **shape).to(dtype), ranks  # type: ignore[arg-type]  # transformers wraps nn.Module.to


def tree(slot: int, start: int) -> Segment:
    """Return a root with two children, of which one has a child."""
    seen = np.eye(4, dtype=np.bool_)
    seen[:, 0] = seen[3, 1] = True
    positions = start + np.array([0, 1, 1, 2])
    return Segment(slot, start, start, np.array([5, 6, 7, 8]), positions, seen, np.arange(4))


def logits(model: PreTrainedModel, rank: int | None = None) -> Tensor:
    """Return the logits of prompts, of single rows and of a tree: few rows take other loops than many.

    The first of several ranks taps layers, as it does for a draft head; others do not.
    """
    target = PackedModel(model, slots=3, capacity=96, tapped=(0, 1) if rank == 0 else ())
    steps = [
        [chain(0, 0, TEXT[:50], keep_last=True), chain(1, 0, TEXT[50:], keep_last=True)],
        [chain(0, 50, [3], keep_last=True)],
        [chain(0, 51, [4], keep_last=True), tree(1, 40)],
    ]
    return torch.cat([target.forward(segments) for segments in steps])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_the_logits_of_a_split_model_have_the_bits_of_the_whole(form: int, dtype: torch.dtype) -> None:
    model, sizes = whole(form, dtype)
    split = {ranks: on_ranks(model, ranks, logits)[0] for ranks in sizes}
    fuse_layers(model)
    exact = logits(model)
    for ranks, found in split.items():
        assert torch.equal(found, exact), f"on {ranks} ranks"


def test_the_logits_of_a_split_model_with_fp8_kv_have_the_bits_of_the_whole() -> None:
    def prepare(some: PreTrainedModel) -> None:
        store_kv_in_fp8(some)
        fuse_layers(some)

    model, sizes = whole(0, torch.bfloat16)
    split = on_ranks(model, sizes[0], logits, prepare)[0]
    prepare(model)
    assert torch.equal(split, logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_models_write_the_same_texts_greedily_and_sampled_with_drafts(dtype: torch.dtype) -> None:
    model, sizes = whole(0, dtype)
    draft = packed(tiny(FORMS[0][0], **FORMS[0][1]), slots=8, capacity=1024)  # the same weights, in float32

    def texts(target: PackedModel) -> list[list[int]]:
        some = greedy_and_sampled(Sampling(temperature=0.9, top_k=20, top_p=0.95))
        drafter = ModelDrafter(draft, "draft", draft.config.vocab_size)
        results = decode(engine(target, drafter, options(Mode.OPT_TREE, max_sequences=8)), some)
        assert any(result.stats.accepted_tokens for result in results), "no draft was of any use"
        return outputs(some)

    def on_rank(shard: PreTrainedModel, rank: int) -> list[list[int]] | None:
        if rank:
            channel.follow(shard, rank)
            return None
        try:
            return texts(LeaderModel(shard, channel, 0, slots=8, capacity=512))  # type: ignore[arg-type]
        finally:
            channel.send([RankCommand(CommandKind.END)])

    written = []
    for ranks in sizes:
        channel = ThreadChannel(ranks)
        written.append(on_ranks(model, ranks, on_rank)[0])
    fuse_layers(model)
    assert written == [texts(packed(model, slots=8, capacity=512))] * len(sizes)


def test_a_lost_rank_ends_the_forward_of_the_others() -> None:
    def lose(shard: PreTrainedModel, rank: int) -> None:
        target = PackedModel(shard, slots=1, capacity=64)
        if rank == 0:
            with pytest.raises(RankLost):
                target.forward([chain(0, 0, TEXT[:5], keep_last=True)])

    model, _ = whole(0, torch.float32)
    on_ranks(model, 2, lose)


@pytest.mark.parametrize(("heads", "kv_heads", "parts"), [(40, 8, 8), (9, 3, 3), (32, 32, 8), (24, 12, 12), (7, 1, 1)])
def test_every_number_of_ranks_divides_the_parts_of_a_sum(heads: int, kv_heads: int, parts: int) -> None:
    assert parts_of(heads, kv_heads) == parts
    assert all(parts % ranks == 0 for ranks in tp_sizes_of(heads, kv_heads))


@pytest.mark.parametrize("parts", [1, 2, 3, 6, 8, 12, 24])
def test_the_sums_that_ranks_send_add_up_to_the_tree_of_all_parts(parts: int) -> None:
    torch.manual_seed(0)
    rows = list(torch.randn(parts, 500))
    for ranks in (n for n in range(1, 9) if parts % n == 0):
        own = parts // ranks
        each = Shard(parts, Absent(0, ranks)).sums
        dealt = [rows[rank * own : (rank + 1) * own] for rank in range(ranks)]
        sent = [added(some) if each == 1 else torch.stack(some) for some in dealt]
        assert torch.equal(added(list(torch.cat([part.view(-1, 500) for part in sent]))), added(rows))


def test_the_parts_of_the_ranks_are_those_of_the_whole() -> None:
    for inputs, parts in ((1536, 3), (27648, 8), (104, 4)):
        edges = Shard(parts).bounds(inputs)
        for ranks in (n for n in range(1, 9) if parts % n == 0):
            share = inputs // ranks
            found = [Shard(parts, Absent(rank, ranks)).bounds(share) + rank * share for rank in range(ranks)]
            assert all(one[-1] == other[0] for one, other in pairwise(found))
            assert set(np.concatenate(found)) == set(edges)
