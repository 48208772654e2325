"""Weights of linear layers in int8 or FP8 with scales.

Quantising rounds each weight to `value * scale`. The layer keeps these rounded weights in the model's dtype, too, until
a kernel takes the bytes: so transformers' own forward, and the check against it, see the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from worker.engine.quantization.activations import ActivationScheme

BLOCK = 128  # inputs, and columns, that share a scale in FP8 checkpoints with block scales
_ATTRIBUTE = "basic_quantized"  # attribute of a linear layer: its QuantizedWeight
_INT8_MAX, _FP8_MAX = 127.0, 448.0
_ROUTERS = ("gate", "router", "shared_expert_gate")  # layers that choose experts: their rounding would change choices


class QuantizationMethod(StrEnum):
    """How weights are stored."""

    INT8 = "int8"
    FP8 = "fp8"  # e4m3
    FP8_DYNAMIC = "fp8-dynamic"  # and rows in FP8, with scales of their own
    FP8_STATIC = "fp8-static"  # and rows in FP8, with a scale that the checkpoint has

    @property
    def is_int8(self) -> bool:
        """Whether weights are int8; others are FP8."""
        return self is QuantizationMethod.INT8


_SCHEMES = {QuantizationMethod.FP8_DYNAMIC: ActivationScheme()}  # of methods that `quantize` takes


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight [columns, inputs] as values and scales: one scale for each column, or one for each block of inputs."""

    values: Tensor  # [columns, inputs] int8 or float8_e4m3fn
    scale: Tensor  # [groups, columns] float32; groups: 1, or one for each BLOCK inputs
    activations: ActivationScheme | None = None  # how rows are rounded to FP8; None: they keep their dtype

    @property
    def kind(self) -> QuantizationMethod:
        """How the values are stored, and rows are rounded."""
        if self.values.dtype == torch.int8:
            return QuantizationMethod.INT8
        if self.activations is None:
            return QuantizationMethod.FP8
        dynamic = self.activations.static_scale is None
        return QuantizationMethod.FP8_DYNAMIC if dynamic else QuantizationMethod.FP8_STATIC

    @property
    def has_blocks(self) -> bool:
        """Whether each block of inputs has a scale of its own."""
        return len(self.scale) > 1

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [columns, inputs] in `dtype`, rounded to it."""
        inputs = self.values.shape[1]
        scale = self.scale.repeat_interleave(BLOCK, 0)[:inputs] if self.has_blocks else self.scale
        return (self.values.float() * scale.T).to(dtype)


def quantized(weight: Tensor, kind: QuantizationMethod) -> QuantizedWeight:
    """Round a weight [columns, inputs] to int8 or e4m3 with one scale a column.

    The largest weight of a column becomes the largest value of the format. Raises ValueError for weights that are not
    finite.
    """
    wide = weight.detach().float()
    top = wide.abs().amax(1)
    if not bool(top.isfinite().all()):
        raise ValueError("the weights have infinite or NaN numbers")
    largest = _INT8_MAX if kind.is_int8 else _FP8_MAX
    scale = torch.where(top > 0, top / largest, 1.0)
    values = (wide / scale[:, None]).clamp_(-largest, largest)
    stored = values.round_().to(torch.int8) if kind.is_int8 else values.to(torch.float8_e4m3fn)
    return QuantizedWeight(stored, scale[None], _SCHEMES.get(kind))


def quantize(model: nn.Module, kind: QuantizationMethod) -> None:
    """Quantise the linear layers of a model in place.

    Embeddings, norms and routers keep their dtype; so does the output layer with FP8, whose steps are too coarse for
    logits. An output layer that shares the embeddings' weights gets weights of its own.
    """
    for layer in list(quantizable(model, kind)):
        attach(layer, quantized(layer.weight, kind))


def quantizable(model: nn.Module, kind: QuantizationMethod) -> Iterator[nn.Linear]:
    """Yield the linear layers of a model that `quantize` rounds."""
    for name, layer in _linear_layers(model):
        output = not kind.is_int8 and name == "lm_head"
        if not output and name.rpartition(".")[2] not in _ROUTERS:
            yield layer


def attach(layer: nn.Linear, weight: QuantizedWeight) -> None:
    """Give a layer a quantised weight, and the same weight rounded to the layer's dtype."""
    layer.weight = nn.Parameter(weight.dequantized(layer.weight.dtype), requires_grad=False)
    setattr(layer, _ATTRIBUTE, weight)


def stored_weight(layer: nn.Module) -> QuantizedWeight | None:
    """Return the quantised weight of a layer; None if it has none."""
    found: QuantizedWeight | None = getattr(layer, _ATTRIBUTE, None)
    return found


def quantized_weights(layers: Sequence[nn.Module]) -> list[QuantizedWeight] | None:
    """Return the quantised weights of layers that are stacked; None unless all have one of the same kind."""
    found = [weight for layer in layers if (weight := stored_weight(layer)) is not None]
    same = len({(weight.kind, len(weight.scale), weight.activations) for weight in found}) == 1
    return found if same and len(found) == len(layers) else None


def quantization_method(model: nn.Module) -> QuantizationMethod | None:
    """Return how the linear layers of a model that is not fused yet are stored; None: in its dtype."""
    found = (stored_weight(layer) for _, layer in _linear_layers(model))
    return next((weight.kind for weight in found if weight is not None), None)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and layer.in_features % 2 == 0:  # kernels read weights in pairs
            yield name, layer
