"""Prepacked projections for the CPU: the same products, from weights laid out once for a handful of rows.

A decoding step multiplies a few rows with every weight of the model. oneDNN's blocked layout reads a weight at memory
speed for one row and does eight rows for little more, where the plain layout takes twice the time and more. Modules are
swapped in the loaded model; the model's source stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PACKED_FOR_ROWS = 16  # the layout chosen for so many rows serves one row as well (measured)


class PackedLinear(nn.Module):
    """A linear layer over a prepacked weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack `weight` [out, in]; raises RuntimeError where oneDNN can't (an unsupported dtype or processor)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACKED_FOR_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` for `x` [..., in]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


def prepack(model: nn.Module) -> int:
    """Swap every linear layer of a CPU model for a prepacked one; return how many. Zero where oneDNN can't pack."""
    if not _can_pack(model):
        return 0
    swapped = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child.weight, child.bias))
                swapped += 1
    return swapped


def _can_pack(model: nn.Module) -> bool:
    first = next((m for m in model.modules() if type(m) is nn.Linear), None)
    if first is None or first.weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    try:
        PackedLinear(first.weight[:16, :16], None)
    except RuntimeError:  # oneDNN says itself which dtypes this processor can pack
        return False
    return True
