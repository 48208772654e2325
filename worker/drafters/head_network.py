"""The head's network: decoder layers over tokens and the target's hidden states (EAGLE-3, arXiv 2503.01840, section 3).

Row p reads token p and the state at p - 1, and predicts token p + 1. Where the target has run, the state is
fused from hidden states of several target layers. Below the root of a tree it is the network's own output; EAGLE-3's
training-time test trains it for that. Embeddings and output weights are the target's, so a head is small.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from worker.engine.errors import ModelRefused


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Shape of the network. It must fit the target."""

    width: int  # of the target's hidden states
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    eps: float  # of the norms
    rope_theta: float
    layers: int  # of the head itself
    taps: tuple[int, ...]  # target layers whose outputs are read
    vocabulary: int  # number of tokens that can be proposed

    @classmethod
    def of(cls, target: PretrainedConfig, layers: int, vocabulary: int) -> Self:
        """Return the shape for a target: layers of its size, which read its states after each third of its layers.

        Raises ModelRefused if the target's configuration lacks a size.
        """
        missing = [
            name for name in ("intermediate_size", "rms_norm_eps", "rope_parameters") if not hasattr(target, name)
        ]
        if missing:
            raise ModelRefused(
                f"a head can't be made for a {target.model_type}: its configuration has no {missing[0]}; train a draft "
                "of its own with --kind model"
            )
        heads = target.num_attention_heads
        return cls(
            width=target.hidden_size,
            heads=heads,
            kv_heads=getattr(target, "num_key_value_heads", None) or heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
            inner=target.intermediate_size,
            eps=target.rms_norm_eps,
            rope_theta=float((target.rope_parameters or {}).get("rope_theta", 10_000.0)),
            layers=layers,
            taps=tapped_layers(target.num_hidden_layers),
            vocabulary=min(vocabulary, target.vocab_size),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the shape for `config.json`."""
        return asdict(self)

    def llama(self) -> LlamaConfig:
        """Return the configuration of the layers."""
        return LlamaConfig(
            vocab_size=1,  # the embeddings are the target's
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


def tapped_layers(layers: int) -> tuple[int, ...]:
    """Return the target layers that a head reads: the last of each third."""
    return tuple(sorted({max(layers * third // 3, 1) - 1 for third in (1, 2, 3)}))


class HeadNetwork(nn.Module):
    """The trained part of a head."""

    first_token = 0  # rows begin at the first token

    def __init__(self, shape: HeadShape) -> None:
        """Start with random layers; the linear ones are near the identity of the target's last state."""
        super().__init__()
        self.shape = shape
        self.unit = LlamaRMSNorm(shape.width, shape.eps)
        self.unit.requires_grad_(False)  # a scale before a linear layer is redundant
        self.fuse = nn.Linear(len(shape.taps) * shape.width, shape.width, bias=False)
        self.join = nn.Linear(2 * shape.width, shape.width, bias=False)
        self.model = LlamaModel(shape.llama())
        del self.model.embed_tokens
        with torch.no_grad():
            eye = torch.eye(shape.width)
            self.fuse.weight.mul_(0.1)[:, -shape.width :] += eye
            self.join.weight.mul_(0.1)[:, -shape.width :] += eye

    def states(self, tapped: Tensor) -> Tensor:
        """Return states [..., width] from the target's hidden states [..., taps * width]."""
        units: Tensor = self.unit(tapped.view(*tapped.shape[:-1], -1, self.shape.width))
        out: Tensor = self.fuse(units.flatten(-2))
        return out

    def entries(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Return the layers' input [..., width] from embedded tokens and the states at the positions before them."""
        units: Tensor = self.unit(torch.stack([embedded, states], dim=-2))
        out: Tensor = self.join(units.flatten(-2))
        return out

    def outputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the output weights read, and the states that rows pass on: both are the normed output."""
        normed: Tensor = self.model.norm(hidden)
        return normed, normed
