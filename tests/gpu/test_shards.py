"""Ranks of a split model on one GPU, one after the other in one process: they have the bits of the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.shards import PeerExchange, ThreadExchange, on_ranks
from tests.unit.worker.engine.paged.test_attention import tree
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.paged.cuda_graphs import no_capture
from worker.engine.segments import chain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def network(dtype: torch.dtype) -> PreTrainedModel:
    """Return two random layers in whose products every number of rows has its own tiles, and ranks their own sums."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=2048, attention_bias=True,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    made.train(False)
    made.to(dtype)  # type: ignore[arg-type]  # transformers wraps nn.Module.to as its types don't say
    return made


def prepare(model: PreTrainedModel) -> None:
    model.to("cuda")  # type: ignore[arg-type]  # transformers wraps nn.Module.to as its types don't say
    model.set_attn_implementation(ATTENTION_NAME)
    fuse_layers(model)


def logits(model: PreTrainedModel) -> Tensor:
    target = PackedModel(model, slots=4, capacity=512)
    steps = [
        [chain(0, 0, list(range(2, 20)), keep_last=True), chain(1, 0, list(range(3, 203)), keep_last=True)],
        [tree(0, 18), chain(1, 200, [5], keep_last=True)],
        [chain(2, 0, list(range(5, 75)), keep_last=True)],
    ]
    return torch.cat([target.forward(step)[:, : model.config.vocab_size] for step in steps])


@pytest.mark.parametrize("exchange", [ThreadExchange, PeerExchange])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_logits_of_a_split_model_have_the_bits_of_the_whole(
    dtype: torch.dtype, exchange: type[ThreadExchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.engine.paged.shape_buckets.graph_capture", lambda _: no_capture)  # ranks meet in Python
    model = network(dtype)
    found = {
        ranks: on_ranks(model, ranks, lambda shard, _: logits(shard), prepare, exchange=exchange, turns=True)[0]
        for ranks in (2, 4, 8)
    }
    prepare(model)
    exact = logits(model)
    for ranks, of_ranks in found.items():
        assert torch.equal(of_ranks, exact), f"on {ranks} ranks"
