"""Prepacked and fused projections for the CPU: the same products, from weights laid out once for a handful of rows.

A decoding step multiplies a few rows with every weight of the model. oneDNN's blocked layout reads a weight at memory
speed for one row and does eight rows for little more, where the plain layout takes twice the time and more; and one
product over the stacked weights of query, key and value is quicker than three. Modules are swapped in the loaded model;
the model's source stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_PACKED_FOR_ROWS = 16  # the layout chosen for so many rows serves one row as well (measured)
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that models call on the same input


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


class _Stack:
    """One product for several layers with the same input, computed when the first of them is called."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        biases = [layer.bias for layer in layers]
        stacked = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self._linear = PackedLinear(torch.cat([layer.weight.detach() for layer in layers]), stacked)
        self._sizes = [layer.out_features for layer in layers]
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return one layer's share; each share of an input is handed out once."""
        if x is not self._input or index not in self._outputs:
            self._input = x
            self._outputs = dict(enumerate(self._linear(x).split(self._sizes, dim=-1)))
        share = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return share


class StackedLinear(nn.Module):
    """One layer of a stack, in the place where the model calls it."""

    def __init__(self, stack: _Stack, index: int) -> None:
        """Stand for layer `index` of the stack."""
        super().__init__()
        self._stack = stack
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's share of the product."""
        return self._stack.output(self._index, x)


def prepack(model: nn.Module) -> int:
    """Swap every linear layer of a CPU model for a prepacked one; return how many. Zero where oneDNN can't pack."""
    if not _can_pack(model):
        return 0
    return sum(_stack_siblings(parent) + _pack_children(parent) for parent in list(model.modules()))


def _stack_siblings(parent: nn.Module) -> int:
    swapped = 0
    for names in _SIBLINGS:
        layers = [child for child in (getattr(parent, name, None) for name in names) if type(child) is nn.Linear]
        if len(layers) == len(names) and len({layer.bias is None for layer in layers}) == 1:
            stack = _Stack(layers)
            for index, name in enumerate(names):
                setattr(parent, name, StackedLinear(stack, index))
            swapped += len(names)
    return swapped


def _pack_children(parent: nn.Module) -> int:
    layers = [(name, child) for name, child in parent.named_children() if type(child) is nn.Linear]
    for name, layer in layers:
        setattr(parent, name, PackedLinear(layer.weight, layer.bias))
    return len(layers)


def _can_pack(model: nn.Module) -> bool:
    first = next((m for m in model.modules() if type(m) is nn.Linear), None)
    if first is None or first.weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    try:
        PackedLinear(first.weight[:16, :16], None)
    except RuntimeError:  # oneDNN says itself which dtypes this processor can pack
        return False
    return True
