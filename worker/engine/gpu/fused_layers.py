"""Fused decoder layers for the GPU: nine kernels per layer. A row's bits do not depend on the other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.cpu.fused_layers import LayerStack, are_known, window_of
from worker.engine.paged.attention import PagedAttentionPlan


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights of one layer, stacked where they have the same input."""

    before: Tensor  # [width] norm before attention
    qkv: Tensor  # [(heads + 2 kv_heads) * dim, width]
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor] | None  # [dim] norms of queries and keys
    o: Tensor
    o_bias: Tensor | None
    after: Tensor  # [width] norm after attention
    gate_up: Tensor  # [2 * inner, width]
    down: Tensor  # [width, inner]
    window: int | None


class GpuLayers(LayerStack):
    """All decoder layers of a model as one module, which replaces the list of layers."""

    def __init__(self, layers: nn.ModuleList, norm: Any, kernels: ModuleType) -> None:
        """Take the weights of transformers layers of a known class, which leave `layers`, and of the last norm."""
        super().__init__()
        self._kernels = kernels
        first: Any = layers[0]
        self._eps = float(first.input_layernorm.variance_epsilon)
        self._scaling = float(first.self_attn.scaling)
        self._last = norm.weight.detach()
        self._taps: list[int] = []
        self._layers = []
        for number, layer in enumerate(layers):
            self._layers.append(_weights(layer))
            layers[number] = nn.Identity()  # frees its memory: at most one layer is held twice

    def tap(self, layers: Sequence[int]) -> None:
        """Write the outputs of these layers to `plan.tapped` [n, taps, width] in every forward."""
        self._taps = list(layers)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        plan: PagedAttentionPlan,
        **_: object,
    ) -> Tensor:
        """Return the normed output of the last layer for `hidden_states` [1, n, width]."""
        x, delta = hidden_states[0], None
        rotary = position_embeddings[0][0].contiguous(), position_embeddings[1][0].contiguous()
        if self._taps:
            plan.tapped = x.new_empty(len(x), len(self._taps), x.shape[1])
        for number, layer in enumerate(self._layers):
            x, normed = self._kernels.norm(x, delta, layer.before, self._eps)
            self._tap(plan, number - 1, x)
            qkv = self._kernels.multiply_apart(normed, layer.qkv, layer.qkv_bias)
            query = self._kernels.rotate_and_store(
                qkv, rotary, layer.head_norms, self._eps, plan.kv, number, plan.rows.entries
            )
            seen = plan.attend_stored(number, query, self._scaling, layer.window).flatten(1)
            delta = self._kernels.multiply_apart(seen, layer.o, layer.o_bias)
            x, normed = self._kernels.norm(x, delta, layer.after, self._eps)
            inner = self._kernels.multiply(normed, layer.gate_up, gated=True)
            delta = self._kernels.multiply_apart(inner, layer.down)
        x, normed = self._kernels.norm(x, delta, self._last, self._eps)
        self._tap(plan, len(self._layers) - 1, x)
        out: Tensor = normed.unsqueeze(0)
        return out

    def _tap(self, plan: PagedAttentionPlan, number: int, x: Tensor) -> None:
        for index, tapped in enumerate(self._taps):
            if tapped == number:
                assert plan.tapped is not None
                plan.tapped[:, index] = x


class GpuLinear(nn.Module):
    """A linear layer with float32 outputs: rounding logits would create ties."""

    def __init__(self, linear: nn.Linear, kernels: ModuleType) -> None:
        super().__init__()
        self._kernels = kernels
        self.weight, self._bias = linear.weight, linear.bias
        self.out_features, self.in_features = linear.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` in float32 for `x` [..., in]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        out: Tensor = self._kernels.multiply(rows, self.weight, self._bias, floats=True)
        return out.view(*x.shape[:-1], -1)


def fuse_on_gpu(model: nn.Module, kernels: ModuleType) -> bool:
    """Replace the decoder layers, last norm and output layer of a model if its layers are known; return whether.

    `kernels` is the module `worker.engine.gpu.kernels`, which can only be imported with Triton.
    """
    body: Any = getattr(model, "model", None)
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not are_known(layers):
        return False
    # The model calls the modules in its list of layers one after the other; now there is one that runs all layers.
    body.layers = nn.ModuleList([GpuLayers(layers, body.norm, kernels)])
    body.norm = nn.Identity()
    output: Any = model.lm_head
    if type(output) is nn.Linear:
        model.lm_head = GpuLinear(output, kernels)
    return True


@torch.inference_mode()
def _weights(layer: Any) -> _Weights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    norms: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return _Weights(
        before=layer.input_layernorm.weight.detach(),
        qkv=torch.cat([projection.weight for projection in projections]),
        qkv_bias=None if projections[0].bias is None else torch.cat([part.bias for part in projections]),
        head_norms=None if norms[0] is None else (norms[0].weight.detach(), norms[1].weight.detach()),
        o=attention.o_proj.weight.detach(),
        o_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
        after=layer.post_attention_layernorm.weight.detach(),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight.detach(),
        window=window_of(attention),
    )
