"""Fused decoder layers for the GPU: nine kernels per layer. A row's bits do not depend on the other rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.attention_options import AttentionOptions
from worker.engine.cpu.fused_layers import LayerStack, are_known, decoder_layers, window_of
from worker.engine.gpu.product_parts import ProductParts, parts_of_columns, parts_of_inputs
from worker.engine.paged.attention import PagedAttentionPlan
from worker.engine.quantization.weights import QuantizedWeight, quantized_weights
from worker.engine.shards.exchange import PeerSums
from worker.engine.shards.output_layer import deal_output
from worker.engine.shards.shard import WHOLE, Shard

Weight = Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights of one layer, stacked where they have the same input."""

    before: Tensor  # [width] norm before attention
    qkv: Weight  # [(heads + 2 kv_heads) * dim, width]
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor] | None  # [dim] norms of queries and keys
    o: Weight
    o_bias: Tensor | None
    after: Tensor  # [width] norm after attention
    gate_up: Weight  # [2 * inner, width]
    down: Weight  # [width, inner]
    window: int | None
    parts: tuple[ProductParts, ProductParts, ProductParts]  # of the products with `qkv`, `o` and `down`

    def stored(self) -> Iterator[Tensor]:
        """Yield the tensors that the layer keeps in memory."""
        for part in (*(getattr(self, field.name) for field in fields(self)), *(self.head_norms or ())):
            if isinstance(part, QuantizedWeight):
                yield from (part.values, part.scale)
            elif isinstance(part, Tensor):
                yield part

    def load(self, others: _Weights) -> None:
        for held, weight in zip(self.stored(), others.stored(), strict=True):
            held.copy_(weight)


class GpuLayers(LayerStack):
    """All decoder layers of a model as one module, which replaces the list of layers."""

    def __init__(self, layers: nn.ModuleList, norm: Any, kernels: ModuleType, shard: Shard = WHOLE) -> None:
        """Take the weights of transformers layers of a known class, which leave `layers`, and of the last norm.

        The layers are a shard of the model's.
        """
        super().__init__()
        self._kernels, self._shard = kernels, shard
        first: Any = layers[0]
        self._eps = float(first.input_layernorm.variance_epsilon)
        self._scaling = float(first.self_attn.scaling)
        self._last = norm.weight.detach()
        self._taps: list[int] = []
        self._layers = []
        for number, layer in enumerate(layers):
            self._layers.append(_weights(layer, shard))
            layers[number] = nn.Identity()  # frees its memory: at most one layer is held twice

    def tap(self, layers: Sequence[int]) -> None:
        """Write the outputs of these layers to `plan.tapped` [n, taps, width] in every forward."""
        self._taps = list(layers)

    def stored(self) -> list[Tensor]:
        """Return the tensors that the layers keep in memory."""
        return [self._last, *(part for layer in self._layers for part in layer.stored())]

    def load(self, layers: nn.ModuleList) -> None:
        """Overwrite the weights with those of transformers layers; captured graphs read them from now on."""
        for held, layer in zip(self._layers, layers, strict=True):
            held.load(_weights(layer, self._shard))

    def load_last(self, norm: Any) -> None:
        """Overwrite the weight of the last norm."""
        self._last.copy_(norm.weight)

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
            of_qkv, of_o, of_down = layer.parts
            x, normed = self._kernels.norm(x, delta, layer.before, self._eps)
            self._tap(plan, number - 1, x)
            qkv = self._kernels.multiply_apart(normed, layer.qkv, of_qkv, layer.qkv_bias)
            query = self._kernels.rotate_and_store(
                qkv, rotary, layer.head_norms, self._eps, plan.kv, number, plan.rows.entries
            )
            seen = plan.attend_stored(number, query, AttentionOptions(self._scaling, layer.window)).flatten(1)
            delta = self._sums(seen, layer.o, of_o)
            x, normed = self._kernels.norm(x, delta, layer.after, self._eps, layer.o_bias)
            inner = self._kernels.multiply(normed, layer.gate_up, gated=True)
            delta = self._sums(inner, layer.down, of_down)
        x, normed = self._kernels.norm(x, delta, self._last, self._eps)
        self._tap(plan, len(self._layers) - 1, x)
        out: Tensor = normed.unsqueeze(0)
        return out

    def _sums(self, x: Tensor, weight: Weight, parts: ProductParts) -> Tensor | PeerSums:
        """Return the sums of x @ weight.T, of whose inputs this rank has a share."""
        exchange, rows = self._shard.exchange, len(x)
        if exchange is None:
            own: Tensor = self._kernels.multiply_apart(x, weight, parts)
            return own
        room = exchange.room_for_sums(parts.sums(rows), rows, _shape(weight)[0], x.device)
        return exchange.sums_of_all(self._kernels.multiply_apart(x, weight, parts, out=room))

    def _tap(self, plan: PagedAttentionPlan, number: int, x: Tensor) -> None:
        for index, tapped in enumerate(self._taps):
            if tapped == number:
                assert plan.tapped is not None
                plan.tapped[:, index] = x


class GpuLinear(nn.Module):
    """A linear layer with float32 outputs: rounding logits would create ties."""

    def __init__(self, linear: nn.Linear, kernels: ModuleType, shard: Shard = WHOLE) -> None:
        """Take the weight of a layer; of one that ranks share, with this rank's share of its columns."""
        super().__init__()
        self._kernels, self._exchange = kernels, shard.exchange
        self._stored, self._bias = _stacked([linear]), linear.bias
        # For models that read the shape or dtype of their weights.
        self.weight = linear.weight.to("meta") if isinstance(self._stored, QuantizedWeight) else linear.weight
        self.out_features, self.in_features = linear.weight.shape

    def stored(self) -> list[Tensor]:
        """Return the tensors that the layer keeps in memory."""
        weight = self._stored
        return [weight.values, weight.scale] if isinstance(weight, QuantizedWeight) else [weight]

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` in float32 for `x` [..., in].

        Of a layer that ranks share, the first rank has all columns, with those that fill the last share, and others
        have their own.
        """
        rows = x.reshape(-1, self.in_features).contiguous()
        out: Tensor = self._kernels.multiply(rows, self._stored, self._bias, floats=True)
        shares = None if self._exchange is None else self._exchange.gather(out)
        return (out if shares is None else torch.cat(shares, 1)).view(*x.shape[:-1], -1)


def fuse_on_gpu(model: nn.Module, kernels: ModuleType, shard: Shard = WHOLE) -> bool:
    """Replace the decoder layers, last norm and output layer of a shard if its layers are known; return whether.

    The output layer of a model that ranks share has this rank's columns only.

    `kernels` is the module `worker.engine.gpu.kernels`, which can only be imported with Triton.
    """
    layers = decoder_layers(model)
    if layers is None or not are_known(layers):
        return False
    body: Any = model.model
    # The model calls the modules in its list of layers one after the other; now there is one that runs all layers.
    body.layers = nn.ModuleList([GpuLayers(layers, body.norm, kernels, shard)])
    body.norm = nn.Identity()
    output: Any = model.lm_head
    if type(output) is nn.Linear:
        model.lm_head = GpuLinear(deal_output(output, shard), kernels, shard)
    return True


@torch.inference_mode()
def _weights(layer: Any, shard: Shard) -> _Weights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    norms: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    qkv, o, down = _stacked(projections), _stacked([attention.o_proj]), _stacked([mlp.down_proj])
    return _Weights(
        before=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=None if projections[0].bias is None else torch.cat([part.bias for part in projections]),
        head_norms=None if norms[0] is None else (norms[0].weight.detach(), norms[1].weight.detach()),
        o=o,
        o_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
        after=layer.post_attention_layernorm.weight.detach(),
        gate_up=_stacked([mlp.gate_proj, mlp.up_proj]),
        down=down,
        window=window_of(attention),
        parts=(
            parts_of_columns(*_shape(qkv), *_split(qkv, shard)),
            parts_of_inputs(*_shape(o), *_split(o, shard)),
            parts_of_inputs(*_shape(down), *_split(down, shard)),
        ),
    )


def _shape(weight: Weight) -> tuple[int, int]:
    """Return the columns and inputs of a weight."""
    columns, inputs = (weight.values if isinstance(weight, QuantizedWeight) else weight).shape
    return columns, inputs


def _split(weight: Weight, shard: Shard) -> tuple[int, int]:
    """Return the parts of a weight's model, and its ranks; quantised weights are never split."""
    return (1, 1) if isinstance(weight, QuantizedWeight) else (shard.parts, shard.ranks)


def _stacked(layers: Sequence[nn.Linear]) -> Weight:
    """Return the weights of layers with the same input, one below the other; those in FP8 as they are."""
    device = layers[0].weight.device
    found = quantized_weights(layers)
    if found is not None:
        values = torch.cat([weight.values.view(torch.uint8) for weight in found]).view(found[0].values.dtype)
        scale = torch.cat([weight.scale for weight in found], 1)
        return QuantizedWeight(values.to(device), scale.to(device), found[0].activations)
    if len(layers) == 1:
        return layers[0].weight.detach()
    return torch.cat([layer.weight for layer in layers])
