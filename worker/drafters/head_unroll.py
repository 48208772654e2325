"""Unroll a head over whole texts, several steps ahead on its own outputs (EAGLE-3's training-time test).

In step 0, row p reads token p and the target's hidden state before it. In step j, row p reads token p + j and its own
output of step j - 1. It attends to what a tree node at depth j attends to: the rows of step 0 up to p, then its own
rows of steps 1..j.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from worker.drafters.head_network import HeadNetwork

_Cache = list[tuple[Tensor, Tensor]]  # keys and values of one layer, one pair per step


def unroll(network: HeadNetwork, embedded: Tensor, tapped: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield the outputs [texts, n, width] of each step.

    `embedded` [texts, n, width] are token embeddings and `tapped` [texts, n, taps * width] the target's hidden states,
    both padded at the end.
    """
    length = embedded.shape[1]
    caches: list[_Cache] = [[] for _ in network.model.layers]
    states = pad(network.states(tapped)[:, :-1], (0, 0, 1, 0))  # the first token has no state before it
    for step in range(steps):
        ahead = pad(embedded[:, step:], (0, 0, 0, step))
        x = network.entries(ahead, states)
        positions = torch.arange(step, step + length, device=x.device).unsqueeze(0)
        rotary = network.model.rotary_emb(x, position_ids=positions)
        for layer, cache in zip(network.model.layers, caches, strict=True):
            x = _run(layer, x, rotary, cache)
        states = network.model.norm(x)
        yield states


def _run(layer: Any, x: Tensor, rotary: tuple[Tensor, Tensor], cache: _Cache) -> Tensor:
    normed = layer.input_layernorm(x)
    attention = layer.self_attn
    heads = (*x.shape[:2], -1, attention.head_dim)
    query, key, value = (
        project(normed).view(heads).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    groups = attention.num_key_value_groups
    cache.append((repeat_kv(key, groups), repeat_kv(value, groups)))
    mixed = _attend(query, cache, attention.scaling).transpose(1, 2).flatten(2)
    x = x + attention.o_proj(mixed)
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def _attend(query: Tensor, cache: _Cache, scaling: float) -> Tensor:
    """Attend from `query` [texts, heads, n, dim] to step 0 up to the own row, and to the own row of later steps."""
    (keys, values), own = cache[0], cache[1:]
    if not own:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    n = query.shape[2]
    future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ keys.transpose(-1, -2)).masked_fill(future, -torch.inf)
    own_scores = torch.stack([(query * key).sum(-1) for key, _ in own], dim=-1)
    weights = (torch.cat([scores, own_scores], dim=-1) * scaling).float().softmax(-1).to(query.dtype)
    out = weights[..., :n] @ values
    for i, (_, value) in enumerate(own):
        out = out + weights[..., n + i : n + i + 1] * value
    return out
