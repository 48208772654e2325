"""A head as it is trained: over whole texts, several steps ahead on its own outputs (EAGLE-3's training-time test).

In step 0 row p reads token p and the target's state before it. In step j it reads token p + j and its own output of
step j - 1, and sees what a node at depth j of a tree will see: the rows of step 0 up to p, then its own of steps 1..j.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from worker.drafters.head_network import HeadNetwork

_Memory = list[tuple[Tensor, Tensor]]  # keys and values of one layer, by step


def unroll(network: HeadNetwork, embedded: Tensor, tapped: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield the outputs [texts, n, width] of each step.

    `embedded` [texts, n, width] are the tokens and `tapped` [texts, n, taps * width] the target's hidden states, both
    padded at the end.
    """
    length = embedded.shape[1]
    memories: list[_Memory] = [[] for _ in network.model.layers]
    states = pad(network.states(tapped)[:, :-1], (0, 0, 1, 0))  # the first token has no state before it
    for step in range(steps):
        ahead = pad(embedded[:, step:], (0, 0, 0, step))
        x = network.entries(ahead, states)
        positions = torch.arange(step, step + length, device=x.device).unsqueeze(0)
        rotary = network.model.rotary_emb(x, position_ids=positions)
        for layer, memory in zip(network.model.layers, memories, strict=True):
            x = _run(layer, x, rotary, memory)
        states = network.model.norm(x)
        yield states


def _run(layer: Any, x: Tensor, rotary: tuple[Tensor, Tensor], memory: _Memory) -> Tensor:
    normed = layer.input_layernorm(x)
    attention = layer.self_attn
    heads = (*x.shape[:2], -1, attention.head_dim)
    query, key, value = (
        project(normed).view(heads).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    groups = attention.num_key_value_groups
    memory.append((repeat_kv(key, groups), repeat_kv(value, groups)))
    mixed = _attend(query, memory, attention.scaling).transpose(1, 2).flatten(2)
    x = x + attention.o_proj(mixed)
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def _attend(query: Tensor, memory: _Memory, scaling: float) -> Tensor:
    """Attend from [texts, heads, n, dim]: to step 0 up to the row, then to the row's own of later steps."""
    (keys, values), own = memory[0], memory[1:]
    if not own:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    n = query.shape[2]
    later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ keys.transpose(-1, -2)).masked_fill(later, -torch.inf)
    mine = torch.stack([(query * key).sum(-1) for key, _ in own], dim=-1)
    weights = (torch.cat([scores, mine], dim=-1) * scaling).float().softmax(-1).to(query.dtype)
    out = weights[..., :n] @ values
    for i, (_, value) in enumerate(own):
        out = out + weights[..., n + i : n + i + 1] * value
    return out
