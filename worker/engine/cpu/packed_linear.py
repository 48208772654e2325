"""Packed linear layers for the CPU: weights stored in the order in which the kernel reads them.

A decoding step multiplies a few rows with every weight of the model. This layout reads each weight once, at memory
bandwidth. Weights in int8 multiply rows that are rounded to int8, each group of 64 inputs with a scale of its own; FP8
weights are decoded exactly and multiply rows as they are, or rounded to FP8 by their scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor, nn

from worker.engine.cpu.kernels import DECODED_FP8, Finish, Kernels, Product, RowKind, WeightKind, address
from worker.engine.quantization.activations import ActivationScheme
from worker.engine.quantization.weights import QuantizedWeight, quantized_weights
from worker.engine.shards.shard import Shard


class PackedLinear(nn.Module):
    """A linear layer with a packed weight. A row's result does not depend on the other rows."""

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        kernels: Kernels,
        *,
        gated: bool = False,
        floats: bool = False,
        shard: Shard | None = None,
    ) -> None:
        """Take the weights of one layer, or stack several with the same input.

        `gated` packs a gate and an up layer for silu(gate) * up; `floats` returns float32 for every weight dtype. With
        `shard`, sum the product in its parts of the inputs; quantised weights are summed in one.
        """
        super().__init__()
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers)), "all of the stacked layers have a bias, or none"
        self.out_features, self.in_features = sum(layer.out_features for layer in layers), layers[0].in_features
        self._kernels, self._gated = kernels, gated
        self._bias = torch.cat(biases) if biases else None
        quantized = quantized_weights(layers)
        weights = [weight.values for weight in quantized] if quantized else [layer.weight.detach() for layer in layers]
        self._weight = kernels.pack(*weights) if gated else kernels.pack(torch.cat(weights))
        self._scale = _packed_scale(quantized, kernels, gated) if quantized else None
        # For models that read the shape or dtype of their weights. On meta: a model that computes with it fails.
        self.weight = torch.empty(self.out_features, self.in_features, dtype=layers[0].weight.dtype, device="meta")
        self.floats = floats
        self._finish = Finish.GATE if gated else Finish.STORE_FLOAT if floats else Finish.STORE
        self._columns = self.out_features // 2 if gated else self.out_features  # of a result
        self._bounds = None if shard is None or quantized is not None else shard.bounds(self.in_features)
        scheme = quantized[0].activations if quantized else None
        self.product = Product(
            weight=self._weight.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            scale=None if self._scale is None else self._scale.data_ptr(),
            bounds=None if self._bounds is None else address(self._bounds),
            columns=self.out_features,
            inputs=self.in_features,
            kind=WeightKind.of(self._weight.dtype),
            blocks=quantized is not None and quantized[0].has_blocks,
            parts=1 if self._bounds is None else len(self._bounds) - 1,
            rows=_row_kind(scheme),
            row_scale=(scheme and scheme.static_scale) or 0.0,
            row_bound=scheme.bound if scheme else 0.0,
        )

    def load(self, *layers: nn.Linear) -> None:
        """Overwrite the packed weight with that of layers of the same shapes and dtype; biases stay."""
        assert self._scale is None, "quantised weights can't be replaced"
        weights = [layer.weight.detach() for layer in layers]
        if self._gated:
            self._kernels.pack(weights[0], weights[1], into=self._weight)
        else:
            self._kernels.pack(torch.cat(weights), into=self._weight)

    def stored(self) -> list[Tensor]:
        """Return the tensors that the layer keeps in memory."""
        return [part for part in (self._weight, self._scale, self._bias) if part is not None]

    @property
    def rounded_bytes(self) -> int:
        """Bytes that a row takes once it is rounded; 0 for products that take rows as they are."""
        size: int = self._kernels.rounded_row_bytes(byref(self.product))
        return size

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` for `x` [..., in], or silu(gate) * up of a gated layer."""
        rows = x.reshape(-1, self.in_features)
        dtype = torch.float32 if self._finish is Finish.STORE_FLOAT else x.dtype
        out = torch.empty(len(rows), self._columns, dtype=dtype)
        rounded = torch.empty(len(rows) * self.rounded_bytes, dtype=torch.uint8)
        self._kernels.multiply(
            byref(self.product), rows.data_ptr(), out.data_ptr(), len(rows), self._finish, rounded.data_ptr()
        )
        return out.view(*x.shape[:-1], self._columns)


def _row_kind(scheme: ActivationScheme | None) -> RowKind:
    if scheme is None:
        return RowKind.AS_THEY_ARE
    if scheme.static_scale is not None:
        return RowKind.STATIC
    return RowKind.POWERS_OF_TWO if scheme.powers_of_two else RowKind.DYNAMIC


def _packed_scale(weights: Sequence[QuantizedWeight], kernels: Kernels, gated: bool) -> Tensor:
    """Return the scales in the order of packed columns; those of FP8 include the factor that decoding leaves out."""
    factor = 1.0 if weights[0].kind.is_int8 else DECODED_FP8
    scales = [weight.scale * factor for weight in weights]
    return kernels.pack_scale(*scales) if gated else kernels.pack_scale(torch.cat(scales, 1))
