"""Heads for tests: tiny, random, on the tiny targets of `tests.models`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import VOCAB, tiny
from worker.drafters.block import BlockDrafter, PackedBlock
from worker.drafters.block_network import BlockNetwork, BlockShape
from worker.drafters.head import HeadDrafter, PackedHead
from worker.drafters.head_network import HeadNetwork, HeadShape, tapped_layers
from worker.engine.kv.dense import POISON
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.loading import embeddings, output_weights
from worker.engine.model.packed_model import PackedModel
from worker.engine.paged.kv import PagedKv
from worker.engine.quantization.weights import QuantizationMethod
from worker.engine.segments import Segment, chain

TOKENS = torch.arange(0, VOCAB, 2)  # a head proposes every second token


def network(target: PreTrainedModel, layers: int = 1, seed: int = 0) -> HeadNetwork:
    """Return a random head for a target; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return HeadNetwork(HeadShape.of(target.config, layers, len(TOKENS)))


def packed_head(target: PreTrainedModel, net: HeadNetwork, *, slots: int = 4, **given: Any) -> PackedHead:
    """Pack a head with its target's embeddings; call it before the target's layers are fused."""
    rows = output_weights(target)[TOKENS].clone()
    return PackedHead(net, embeddings(target), rows, TOKENS, slots=slots, capacity=1024, **given)


def paged_answers(*, spoilt: bool, **shape: int) -> list[Tensor]:
    """Return logits and states of a prompt and of three siblings below it, from a head with paged KV.

    If `spoilt`, the states of padding rows and all that was never written are POISON. `shape` is the target's.
    """
    target = tiny("llama", **shape)
    head = packed_head(target, network(target), cpu_kernels=False, paged=True)
    siblings = Segment(0, 6, 6, np.array([3, 9, 2]), np.full(3, 6), np.eye(3, dtype=np.bool_), np.arange(3))
    answers: list[Tensor] = []
    for segment in (chain(0, 0, [5, 9, 2, 7, 7, 30], keep_last=True), siblings):
        if spoilt:
            assert isinstance(head._backend.kv, PagedKv)
            head._backend.kv.poison_free()
            head._input_states.fill_(POISON)
        answers += head.forward([segment], torch.ones(len(segment.ids), head._network.shape.width))
    return answers


def tapped(target: PreTrainedModel, *, slots: int = 4, cpu_kernels: bool = True) -> PackedModel:
    """Return a target that stores the hidden states of its tapped layers."""
    target.set_attn_implementation(ATTENTION_NAME)
    if cpu_kernels:
        fuse_layers(target)
    taps = tapped_layers(target.config.num_hidden_layers)
    return PackedModel(target, slots=slots, capacity=512, cpu_kernels=cpu_kernels, tapped=taps)


def with_head(
    target: PreTrainedModel, *, cpu_kernels: bool = True, quantization: QuantizationMethod | None = None
) -> tuple[PackedModel, HeadDrafter]:
    """Return a target and a drafter with a random head for it."""
    head = packed_head(target, network(target), cpu_kernels=cpu_kernels, quantization=quantization)
    model = tapped(target, cpu_kernels=cpu_kernels)
    assert model.hidden is not None
    return model, HeadDrafter(head, model.hidden, "head")


def block_network(target: PreTrainedModel, layers: int = 1, seed: int = 0, tokens: Tensor = TOKENS) -> BlockNetwork:
    """Return a random block drafter for a target, of four depths, whose path head matters from the start."""
    torch.manual_seed(seed)
    net = BlockNetwork(replace(BlockShape.of(target.config, layers, len(tokens)), depth=4, rank=8))
    torch.nn.init.normal_(net.path.out.weight)
    return net


def packed_block(
    target: PreTrainedModel,
    net: BlockNetwork,
    *,
    cpu_kernels: bool = True,
    paged: bool | None = None,
    tokens: Tensor = TOKENS,
) -> PackedBlock:
    """Pack a block drafter with its target's embeddings; call it before the target's layers are fused."""
    given = (embeddings(target), output_weights(target)[tokens].clone(), tokens)
    return PackedBlock(net, *given, slots=4, capacity=1024, cpu_kernels=cpu_kernels, paged=paged)


def with_block(target: PreTrainedModel, tokens: Tensor = TOKENS) -> tuple[PackedModel, BlockDrafter]:
    """Return a target and a drafter with a random block drafter for it, which proposes `tokens`."""
    block = packed_block(target, block_network(target, tokens=tokens), tokens=tokens)
    model = tapped(target)
    assert model.hidden is not None
    return model, BlockDrafter(block, model.hidden, "block")
