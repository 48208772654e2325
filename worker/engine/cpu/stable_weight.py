"""Weights that a model multiplies by itself: the products of routers and experts, with a row's bits its own.

torch chooses an algorithm by the number of rows, and so a row's bits would depend on its batch. A `StableWeight` takes
the place of such a parameter: products with it run in the compiled kernels, everything else as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.engine.cpu.kernels import kernels
from worker.engine.cpu.packed_linear import PackedLinear

# What a model does with a weight before it multiplies: the result is a weight again, made once.
_VIEWS = frozenset(
    [
        Tensor.float, Tensor.to, Tensor.type, Tensor.type_as, Tensor.t, Tensor.transpose, Tensor.permute,
        Tensor.__getitem__, Tensor.T.__get__, Tensor.mT.__get__,  # type: ignore[attr-defined]  # torch's stubs lack it
    ]
)  # fmt: skip
_MOST = 1024  # results of `_VIEWS` that a weight keeps, such as one matrix for each expert


class StableWeight(nn.Parameter):
    """A parameter of two dimensions, or of three for a matrix each."""

    _made: dict[Any, StableWeight]
    _packed: PackedLinear | None
    _columns_last: PackedLinear | None

    def __new__(cls, data: Tensor) -> StableWeight:
        """Wrap a weight; it shares its memory."""
        made = Tensor._make_subclass(cls, data.detach(), False)
        made._made, made._packed, made._columns_last = {}, None, None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch: products of rows with a weight in the kernels."""
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        found = None if product is None or kwargs else product(*args)
        if found is not None:
            return found
        with torch._C.DisableTorchFunctionSubclass():
            weight = args[0] if args else None
            if func not in _VIEWS or not isinstance(weight, StableWeight):
                return func(*args, **kwargs)
            key = (func, repr(args[1:]), repr(kwargs))
            if key not in weight._made:
                view = func(*args, **kwargs)
                if view is weight or len(weight._made) >= _MOST or not isinstance(view, Tensor) or view.dim() < 2:
                    return view
                weight._made[key] = cls(view)
            return weight._made[key]

    def times(self, x: Tensor, *, columns_last: bool) -> Tensor | None:
        """Return `x @ weight`, or `x @ weight.T` unless `columns_last`; None if the kernels can't."""
        with torch._C.DisableTorchFunctionSubclass():
            name = "_columns_last" if columns_last else "_packed"
            packed: PackedLinear | None = getattr(self, name)
            if packed is None:
                matrix = self.t() if columns_last else self
                packed = packed_weight(Tensor.contiguous(matrix))
                setattr(self, name, packed)
            return None if packed is None or x.dtype != self.dtype else packed(x)


def packed_weight(weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> PackedLinear | None:
    """Return a weight [columns, inputs] as a packed layer; None if the kernels can't multiply it.

    With `gated` it stacks a gate and an up weight, for silu(gate) * up.
    """
    compiled = kernels(weight.dtype)
    if compiled is None or weight.device.type != "cpu" or weight.shape[-1] % 2:
        return None
    parts = weight.detach().as_subclass(Tensor).chunk(2) if gated else [weight.detach().as_subclass(Tensor)]
    return PackedLinear([_linear(part, bias) for part in parts], compiled, gated=gated)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _linear_product(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    found = _product(x, weight, columns_last=False)
    return found if bias is None or found is None else found + bias


def _matmul(x: Any, weight: Any) -> Tensor | None:
    return _product(x, weight, columns_last=True)


def _addmm(bias: Any, x: Any, weight: Any) -> Tensor | None:
    found = _product(x, weight, columns_last=True)
    return None if found is None else found + bias


def _product(x: Any, weight: Any, *, columns_last: bool) -> Tensor | None:
    if not isinstance(weight, StableWeight) or isinstance(x, StableWeight):
        return None
    if weight.dim() == 2:
        return weight.times(x, columns_last=columns_last)
    if weight.dim() != 3 or x.dim() != 3 or len(x) != len(weight):
        return None
    parts = [_product(x[i], weight[i], columns_last=columns_last) for i in range(len(weight))]
    known = [part for part in parts if part is not None]
    return torch.stack(known) if len(known) == len(parts) else None


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear_product,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
    torch.addmm: _addmm,
}
