"""Packed linear layers for the CPU: weights stored in the order in which the kernel reads them.

A decoding step multiplies a few rows with every weight of the model. This layout reads each weight once, at memory
bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor, nn

from worker.engine.cpu.kernels import Finish, Kernels, Product


class PackedLinear(nn.Module):
    """A linear layer with a packed weight. A row's result does not depend on the other rows."""

    def __init__(
        self, layers: Sequence[nn.Linear], kernels: Kernels, *, gated: bool = False, floats: bool = False
    ) -> None:
        """Take the weights of one layer, or stack several with the same input.

        `gated` packs a gate and an up layer for silu(gate) * up; `floats` returns float32 for every weight dtype.
        """
        super().__init__()
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers)), "all of the stacked layers have a bias, or none"
        self.out_features, self.in_features = sum(len(w) for w in weights), weights[0].shape[1]
        self._kernels = kernels
        self._bias = torch.cat(biases) if biases else None
        self._weight = kernels.pack(*weights) if gated else kernels.pack(torch.cat(weights))
        # For models that read the shape or dtype of their weights. On meta: a model that computes with it fails.
        self.weight = torch.empty(self.out_features, self.in_features, dtype=weights[0].dtype, device="meta")
        self.floats = floats
        self._finish = Finish.STORE_FLOAT if floats else Finish.STORE
        self.product = Product(
            weight=self._weight.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            columns=self.out_features,
            inputs=self.in_features,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` for `x` [..., in]."""
        rows = x.reshape(-1, self.in_features)
        dtype = torch.float32 if self._finish is Finish.STORE_FLOAT else x.dtype
        out = torch.empty(len(rows), self.out_features, dtype=dtype)
        self._kernels.multiply(byref(self.product), rows.data_ptr(), out.data_ptr(), len(rows), self._finish)
        return out.view(*x.shape[:-1], self.out_features)


def pack(model: nn.Module, kernels: Kernels) -> int:
    """Replace every linear layer of a CPU model by a packed one; return how many."""
    return sum(_pack_children(parent, kernels) for parent in list(model.modules()))


def _pack_children(parent: nn.Module, kernels: Kernels) -> int:
    children = [(name, child) for name, child in parent.named_children() if type(child) is nn.Linear]
    layers = [(name, child) for name, child in children if child.in_features % 2 == 0]  # bfloat16 is packed in pairs
    for name, layer in layers:
        # Logits stay float32: rounding them would create ties.
        setattr(parent, name, PackedLinear([layer], kernels, floats=name == "lm_head" and layer.bias is None))
    return len(layers)
