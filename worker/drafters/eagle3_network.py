"""The network of published EAGLE-3 heads (arXiv 2503.01840, section 3; layer and names as SafeAILab/EAGLE has them).

Row p reads token p and the state at p - 1, as in `head_network`, and there is no row for the first token, which has no
state before it. The first layer reads token and state side by side, so its attention has twice the input width. The
state that a tree row passes on is the network's output before the last norm, or behind it (`norm_output`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


@dataclass(frozen=True, slots=True)
class Eagle3Shape:
    """Shape of a published head."""

    layer: LlamaConfig  # of the decoder layers
    kv_heads: int
    head_dim: int
    target_width: int  # of the target's hidden states
    taps: tuple[int, ...]  # target layers whose outputs are read
    vocabulary: int  # number of tokens that can be proposed
    norm_before_residual: bool  # the first layer adds to the normed state, not to the state itself
    norm_before_fc: bool  # one norm over the target's states together
    fc_norm: bool  # one norm for each of the target's states (EAGLE-3.1)
    norm_output: bool  # rows pass on the normed output (EAGLE-3.1)

    @property
    def width(self) -> int:
        """Width of the head's own states."""
        return int(self.layer.hidden_size)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.layer.num_hidden_layers)


class Eagle3Layer(LlamaDecoderLayer):
    """The first layer: it reads embedded tokens and states side by side, [..., 2 * width]."""

    def __init__(self, config: LlamaConfig, *, norm_before_residual: bool) -> None:
        """Widen the inputs of a Llama layer's attention."""
        super().__init__(config, layer_idx=0)  # type: ignore[no-untyped-call]
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(2 * config.hidden_size, narrow.out_features, bias=narrow.bias is not None)
            setattr(self.self_attn, name, wide)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._norm_before_residual = norm_before_residual

    def forward(self, hidden_states: Tensor, *_: Any, **given: Any) -> Tensor:
        """Return the layer's output [..., width]."""
        embedded, state = hidden_states.chunk(2, dim=-1)
        normed = self.hidden_norm(state)
        residual = normed if self._norm_before_residual else state
        joined = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        attended = residual + self.self_attn(hidden_states=joined, **given)[0]
        out: Tensor = attended + self.mlp(self.post_attention_layernorm(attended))
        return out


class Eagle3Network(nn.Module):
    """A published head without embeddings and output weights."""

    first_token = 1  # rows begin at the second token

    def __init__(self, shape: Eagle3Shape) -> None:
        """Make the modules; load their weights before use."""
        super().__init__()
        config, eps, fused = shape.layer, shape.layer.rms_norm_eps, len(shape.taps) * shape.target_width
        self.shape = shape
        self.fc = nn.Linear(fused, shape.width, bias=False)
        self.input_norm = LlamaRMSNorm(fused, eps) if shape.norm_before_fc else None
        norms = (LlamaRMSNorm(shape.target_width, eps) for _ in shape.taps)
        self.fc_norm = nn.ModuleList(norms) if shape.fc_norm else None
        self.model = LlamaModel(config)
        del self.model.embed_tokens
        self.model.layers[0] = Eagle3Layer(config, norm_before_residual=shape.norm_before_residual)

    def states(self, tapped: Tensor) -> Tensor:
        """Return states [..., width] from the target's hidden states [..., taps * target width]."""
        if self.input_norm is not None:
            tapped = self.input_norm(tapped)
        if self.fc_norm is not None:
            parts = tapped.chunk(len(self.fc_norm), dim=-1)
            tapped = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        out: Tensor = self.fc(tapped)
        return out

    def entries(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Return the layers' input [..., 2 * width] from embedded tokens and the states at the positions before."""
        return torch.cat([embedded, states], dim=-1)

    def outputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the output weights read, and the states that rows pass on, from the last layer's output."""
        normed: Tensor = self.model.norm(hidden)
        return normed, normed if self.shape.norm_output else hidden
