"""Fused decoder layers for the CPU: one call runs all layers of a model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from worker.engine.cpu.attention import CpuAttentionPlan
from worker.engine.cpu.kernels import Kernels, LayerWeights, Scratch
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.errors import ModelRefused
from worker.engine.shards.shard import WHOLE, Shard

_KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


class FusedNorm(nn.Module):
    """A root mean square norm as one kernel."""

    def __init__(self, norm: Any, kernels: Kernels) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.variance_epsilon)
        self._kernels = kernels

    def load(self, norm: Any) -> None:
        """Overwrite the weight with that of another norm."""
        self.weight.data.copy_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed rows of `x` [..., width]."""
        return self._kernels.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class LayerStack(nn.Module):
    """All decoder layers of a model as one module."""

    def tap(self, layers: Sequence[int]) -> None:
        """Write the outputs of these layers to `plan.tapped` [n, taps, width] in every forward."""
        raise NotImplementedError

    def load(self, layers: nn.ModuleList) -> None:
        """Overwrite the weights with those of transformers layers of the same class, shape and dtype."""
        raise NotImplementedError


class FusedLayers(LayerStack):
    """All decoder layers of a model as one module, which replaces the list of layers."""

    def __init__(self, layers: nn.ModuleList, kernels: Kernels, shard: Shard = WHOLE) -> None:
        """Take the weights of transformers layers of a known class, which are a shard of the model's."""
        super().__init__()
        self._kernels, self.shard = kernels, shard
        self._packed = [_Packed(layer, kernels, shard) for layer in layers]
        self.windows = sorted({packed.window for packed in self._packed}, key=lambda window: window or 0)
        self.layers = (LayerWeights * len(layers))(*[packed.layer(self.windows) for packed in self._packed])
        self.taps = 0
        first: Any = layers[0]
        self.eps = float(first.input_layernorm.variance_epsilon)
        self.scaling = float(first.self_attn.scaling)
        self._inner = int(first.mlp.up_proj.out_features)

    def tap(self, layers: Sequence[int]) -> None:
        """Write the outputs of these layers to `plan.tapped` [n, taps, width] in every forward."""
        self.taps = len(layers)
        for layer in self.layers:
            layer.tap = -1
        for index, number in enumerate(layers):
            self.layers[number].tap = index

    def load(self, layers: nn.ModuleList) -> None:
        """Overwrite the weights with those of transformers layers of the same class, shape and dtype."""
        for packed, layer in zip(self._packed, layers, strict=True):
            packed.load(layer)

    def scratch_sizes(self, *others: PackedLinear) -> tuple[int, int, int, int, int]:
        """Return the elements per row of the buffers of `Scratch`, in its order; `others` are multiplied, too."""
        layer = self._packed[0]
        rounded_bytes = max(linear.rounded_bytes for linear in (*layer.linears, *others))
        size = layer.qkv.weight.dtype.itemsize
        return (
            layer.qkv.in_features,
            layer.qkv.out_features,
            layer.o.in_features,
            self._inner,
            -(-rounded_bytes // size),
        )

    def stored(self) -> list[Tensor]:
        """Return the tensors that the layers keep in memory."""
        return [part for packed in self._packed for part in packed.stored()]

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], plan: CpuAttentionPlan, **_: object
    ) -> Tensor:
        """Return the output of the last layer for `hidden_states` [1, n, width]; the layers are those of one rank."""
        x = hidden_states.clone()
        n, width = x.shape[1:]
        cos, sin = (part.contiguous() for part in position_embeddings)
        scratch = [x.new_empty(n * size) for size in self.scratch_sizes()]
        structure, views = plan.structures(self.windows, self.scaling)
        plan.tapped = x.new_empty(n, self.taps, width)
        self._kernels.run_layers(
            self.layers,
            len(self.layers),
            ctypes.byref(structure),
            views,
            ctypes.byref(Scratch(*[part.data_ptr() for part in scratch])),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            plan.kv.keys.data_ptr(),
            plan.kv.values.data_ptr(),
            plan.kv.keys.stride(0),
            width,
            self.eps,
            plan.tapped.data_ptr(),
            self.taps,
        )
        return x


class _Packed:
    """The packed weights of one layer, which `LayerWeights` points to."""

    def __init__(self, layer: Any, kernels: Kernels, shard: Shard) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.window = window_of(attention)
        self.qkv = PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj], kernels)
        self.o = PackedLinear([attention.o_proj], kernels, shard=shard)
        self._gate_up = PackedLinear([mlp.gate_proj, mlp.up_proj], kernels, gated=True)
        self._down = PackedLinear([mlp.down_proj], kernels, shard=shard)
        self._norms: list[Tensor | None] = _norm_weights(layer)

    def load(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv.load(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o.load(attention.o_proj)
        self._gate_up.load(mlp.gate_proj, mlp.up_proj)
        self._down.load(mlp.down_proj)
        for held, weight in zip(self._norms, _norm_weights(layer), strict=True):
            if held is not None and weight is not None:
                held.copy_(weight)

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        """The linear layers, in the order of `LayerWeights`."""
        return self.qkv, self.o, self._gate_up, self._down

    def stored(self) -> list[Tensor]:
        """Return the tensors that the layer keeps in memory."""
        norms = [norm for norm in self._norms if norm is not None]
        return norms + [part for linear in self.linears for part in linear.stored()]

    def layer(self, windows: list[int | None]) -> LayerWeights:
        """Return the C structure; the views of a step are in the order of `windows`."""
        return LayerWeights(
            *[None if norm is None else norm.data_ptr() for norm in self._norms],
            *[linear.product for linear in self.linears],
            windows.index(self.window),
            -1,
        )


def _norm_weights(layer: Any) -> list[Tensor | None]:
    """Return the weights of a layer's norms in the order of `LayerWeights`; None for those that it does not have."""
    names = ("input_layernorm", "post_attention_layernorm")
    norms = [getattr(layer, name) for name in names]
    norms += [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [None if norm is None else norm.weight.detach() for norm in norms]


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """Return the list of a model's decoder layers; None if it has none where most models have it."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


def fuse(model: nn.Module, kernels: Kernels, shard: Shard = WHOLE) -> bool:
    """Replace the decoder layers and last norm of a shard of a model if its layers are known; return whether."""
    layers = decoder_layers(model)
    if layers is None or not are_known(layers):
        return False
    body: Any = model.model
    # The model calls the modules in its list of layers one after the other; now there is one that runs all layers.
    body.layers = nn.ModuleList([FusedLayers(layers, kernels, shard)])
    body.norm = FusedNorm(body.norm, kernels)
    return True


def tap(model: nn.Module, layers: Sequence[int]) -> None:
    """Make a model write the outputs of some decoder layers to `plan.tapped` [n, taps, width], in this order.

    Raises ModelRefused for a model without a list of layers.
    """
    stack = decoder_layers(model)
    if stack is None:
        raise ModelRefused(f"the hidden states of a {type(model).__name__} can't be read: it has no list of layers")
    first = stack[0]
    if isinstance(first, LayerStack):
        first.tap(layers)
        return
    for index, number in enumerate(layers):
        stack[number].register_forward_hook(_Tap(index, len(layers)), with_kwargs=True)


class _Tap:
    """Forward hook that writes a layer's output to the plan of the step."""

    def __init__(self, index: int, taps: int) -> None:
        self._index, self._taps = index, taps

    def __call__(self, _: nn.Module, __: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output)[0]
        plan = given["plan"]
        if plan.tapped is None:
            plan.tapped = hidden.new_empty(hidden.shape[0], self._taps, hidden.shape[1])
        plan.tapped[:, self._index] = hidden


def are_known(layers: nn.ModuleList) -> bool:
    """Return whether the layers are "norm, attention, add; norm, gated SiLU, add" with rotate-half embeddings."""
    return all(_is_known(layer) for layer in layers)


def _is_known(layer: Any) -> bool:
    return (
        type(layer).__name__ in _KNOWN
        and isinstance(layer.mlp.act_fn, SiLUActivation | nn.SiLU)
        and layer.mlp.gate_proj.bias is None
        and layer.mlp.gate_proj.weight.dtype in (torch.bfloat16, torch.float32)
    )


def window_of(attention: Any) -> int | None:
    """Return the sliding window of a layer's attention; some classes have it in the config only."""
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window
