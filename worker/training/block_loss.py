"""The block drafter in training: its rows below sampled roots of whole texts, and losses that follow acceptance.

The loss of a row mixes cross-entropy with the probability of a rejection, as LK losses do (arXiv 2602.23881): with
overlap alpha = sum over tokens of min(p, q), it is lambda * CE(p, q) + (1 - lambda) * (1 - alpha), where
lambda = exp(-3 * alpha) of the depth. CE teaches while hardly anything is accepted, alpha once much is.

A row at depth d counts as much as it contributes to the expected accepted length, as in D-PACE (arXiv 2605.18810): the
derivative of sum_k prod_{i <= k} a_i by log a_d, which is the sum over k >= d. A tree has several nodes at a depth, so
more is accepted than the overlap says; `a` is the overlap, but at least `_MIN_ACCEPTED`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

from worker.drafters.block_network import BlockNetwork
from worker.training.losses import LossOutput, TrainingBatch, TrainingVocabulary

_ETA = 3.0  # how soon the overlap takes over from the cross-entropy
_MIN_ACCEPTED = 0.3


def unroll_blocks(network: BlockNetwork, embedded: Tensor, tapped: Tensor, roots: Tensor, path: Tensor) -> Tensor:
    """Return the outputs [texts, roots, depth, width] of the blocks below `roots` [texts, roots], path head included.

    `embedded` [texts, n, width] are token embeddings and `tapped` [texts, n, taps * width] the target's hidden states,
    both padded at the end. `path` [texts, roots, depth - 1, width] are the embeddings of the tokens below each root.
    """
    states = pad(network.states(tapped)[:, :-1], (0, 0, 1, 0))  # the first token has no state before it
    x = network.entries(embedded, states)
    below = _at(states, roots).unsqueeze(2) + network.offsets
    blocks = network.entries(_at(embedded, roots).unsqueeze(2).expand_as(below), below)
    depths = torch.arange(network.shape.depth, device=roots.device)
    visible = torch.arange(x.shape[1], device=roots.device) <= roots.unsqueeze(-1)  # [texts, roots, n]
    positions = roots.unsqueeze(-1) + depths
    *layers, last = network.model.layers
    for layer in layers:
        keys = _Keys(network, layer, x)
        blocks = keys.run(blocks, positions[..., 1:], visible)
        x = keys.run_all(x)
    rows = torch.cat([_at(x, roots).unsqueeze(2), blocks], dim=2)
    outputs = network.model.norm(_Keys(network, last, x).run(rows, positions, visible))
    return _along(network, outputs, path)


def _at(x: Tensor, roots: Tensor) -> Tensor:
    """Return the rows [texts, roots, width] of `x` [texts, n, width]."""
    return x.gather(1, roots.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class _Keys:
    """The keys and values of one layer over texts, and its rows that attend to them."""

    def __init__(self, network: BlockNetwork, layer: Any, x: Tensor) -> None:
        self._rotary, self._layer = network.model.rotary_emb, layer
        normed, groups = layer.input_layernorm(x), layer.self_attn.num_key_value_groups
        cos, sin = self._rotary(x, position_ids=torch.arange(x.shape[1], device=x.device).unsqueeze(0))
        keys, values = (self._heads(project(normed)) for project in (layer.self_attn.k_proj, layer.self_attn.v_proj))
        self._keys = repeat_kv(_rotated(keys, cos, sin), groups)
        self._values = repeat_kv(values, groups)

    def run(self, rows: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Return the layer's output for rows [texts, roots, depths, width] that see the `visible` tokens."""
        shape = rows.shape
        mask = visible.unsqueeze(2).expand(-1, -1, shape[2], -1).flatten(1, 2).unsqueeze(1)
        return self._run(rows.flatten(1, 2), positions.flatten(1, 2), attn_mask=mask).view(shape)

    def run_all(self, x: Tensor) -> Tensor:
        """Return the layer's output for the tokens themselves [texts, n, width]."""
        return self._run(x, torch.arange(x.shape[1], device=x.device).unsqueeze(0), is_causal=True)

    def _run(self, x: Tensor, positions: Tensor, **seen: Any) -> Tensor:
        layer = self._layer
        cos, sin = self._rotary(x, position_ids=positions)
        query = _rotated(self._heads(layer.self_attn.q_proj(layer.input_layernorm(x))), cos, sin)
        mixed = scaled_dot_product_attention(query, self._keys, self._values, scale=layer.self_attn.scaling, **seen)
        x = x + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self._layer.self_attn.head_dim).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads [texts, heads, n, dim] with rotary positions."""
    out: Tensor = x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


def _along(network: BlockNetwork, outputs: Tensor, path: Tensor) -> Tensor:
    """Add what the path head makes of the tokens [..., depth - 1, width] to the outputs [..., depth, width]."""
    head = network.path
    gates, tokens = head.state(outputs[..., 1:, :]), head.token(network.unit(path))
    paths = [gates.new_zeros(*gates.shape[:2], network.shape.rank)]
    for depth in range(network.shape.depth - 1):
        paths.append(head.advance(gates[..., depth, :], tokens[..., depth, :], paths[-1]))
    return outputs + pad(head.out(torch.stack(paths[1:], dim=2)), (0, 0, 1, 0))


class BlockLoss(nn.Module):
    """A block drafter and its loss over the rows of blocks below sampled roots."""

    def __init__(self, network: BlockNetwork, vocabulary: TrainingVocabulary, roots: int) -> None:
        """Sample `roots` roots in the answer of each text."""
        super().__init__()
        self.network = network
        self.vocabulary = vocabulary
        self._roots = roots

    def forward(self, batch: TrainingBatch) -> LossOutput:
        """Return the mean loss over the rows, and the accuracy of each depth."""
        roots = self._sampled(batch)
        depths = torch.arange(self.network.shape.depth, device=roots.device)
        ahead = roots.unsqueeze(-1) + depths  # rows that predict what the block predicts
        valid = ahead + 1 < batch.length[:, None, None]
        ahead = ahead.clamp(max=batch.ids.shape[1] - 1)
        embedded = self.vocabulary.embedded(batch.ids)
        path = _at(embedded, ahead[..., 1:].flatten(1)).view(*ahead[..., 1:].shape, -1)
        outputs = unroll_blocks(self.network, embedded, batch.hidden, roots, path)
        wanted = (
            _at(x, ahead.flatten(1)).view(*ahead.shape, -1)[valid] for x in (batch.next_ids, batch.next_probabilities)
        )
        logits = linear(outputs[valid], self.vocabulary.output)
        entropy, overlap, hit = self._of_rows(logits, *wanted)
        return self._mean(valid, entropy, overlap, hit)

    def _sampled(self, batch: TrainingBatch) -> Tensor:
        """Return roots [texts, roots] of the answers, one at random of each of as many equal parts."""
        texts, device = len(batch.ids), batch.ids.device
        share = (torch.arange(self._roots, device=device) + torch.rand(texts, self._roots, device=device)) / self._roots
        count = (batch.length - 1 - batch.first).unsqueeze(-1)
        return batch.first.unsqueeze(-1) + (share * count).long().minimum(count - 1)

    def _of_rows(self, logits: Tensor, next_ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return cross-entropy, overlap and whether the argmax is the target's, each [rows]."""
        known, wanted = self.vocabulary.rows(next_ids, wanted)
        log_drafted = logits.float().log_softmax(-1).gather(1, known)
        overlap = torch.minimum(wanted, log_drafted.exp()).sum(-1)
        hit = (logits.detach().argmax(-1) == known[:, 0]) & (wanted[:, 0] > 0)
        return -(wanted * log_drafted).sum(-1), overlap, hit

    def _mean(self, valid: Tensor, entropy: Tensor, overlap: Tensor, hit: Tensor) -> LossOutput:
        depth = torch.arange(valid.shape[-1], device=valid.device).expand_as(valid)[valid]
        counts = valid.sum((0, 1)).clamp(min=1)
        by_depth = torch.zeros_like(counts, dtype=torch.float32).index_add(0, depth, overlap.detach()) / counts
        hits = torch.zeros_like(by_depth).index_add(0, depth, hit.float()) / counts
        trust = (-_ETA * by_depth).exp()[depth]
        losses = trust * entropy + (1 - trust) * (1 - overlap)
        weights = self._weights(valid, overlap.detach())
        return LossOutput((weights * losses).sum() / weights.sum(), tuple(hits.tolist()))

    @staticmethod
    def _weights(valid: Tensor, overlap: Tensor) -> Tensor:
        """Return the weight of each row: its part in the expected accepted length of its block."""
        accepted = torch.zeros(valid.shape, device=valid.device)
        accepted[valid] = overlap.float().clamp(min=_MIN_ACCEPTED)
        reached = accepted.cumprod(-1)
        return reached.flip(-1).cumsum(-1).flip(-1)[valid]
