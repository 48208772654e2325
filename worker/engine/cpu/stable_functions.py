"""Elementwise functions whose bits do not depend on where in a tensor an element lies.

torch computes sigmoid, tanh, cos and others of whole vectors by one algorithm and of the rest of a tensor, or of each
thread's part of it, by another, which rounds differently. So a row's bits would depend on the rows beside it. Here a
tensor is padded to whole vectors and computed in parts that one thread computes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

_VECTOR = 64  # elements: two vectors of the widest instructions, which torch computes at once
_PART = 32768  # elements that torch gives to one thread (at::internal::GRAIN_SIZE)
_NAMES = ("cos", "erf", "exp", "gelu", "log", "logsigmoid", "mish", "sigmoid", "silu", "sin", "softplus", "tanh")
_CALLED = re.compile(rf"\b({'|'.join(_NAMES)})\(")
_FUNCTIONS = frozenset(
    function
    for owner in (torch, Tensor, functional, torch._C._nn)
    for name in _NAMES
    if (function := getattr(owner, name, None)) is not None
)
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")  # modules whose classes are activations


class StableActivation(nn.Module):
    """An activation whose bits depend on an element alone."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self._function = [function]  # in a list: it is not replaced again

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of each element."""
        return _in_parts(self._function[0], x)


class StableFunctions(TorchFunctionMode):
    """While it is active, elementwise functions of torch have stable bits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        given = kwargs or {}
        if func in _FUNCTIONS and args and isinstance(args[0], Tensor) and not given.get("inplace"):
            return _in_parts(lambda x: func(x, *args[1:], **given), args[0])
        return func(*args, **given)


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an elementwise activation without parameters."""
    return type(module).__module__ in _ACTIVATIONS and not any(True for _ in module.parameters())


def make_stable(module: nn.Module) -> bool:
    """Run the forward of a module with stable functions if its code calls any of them; return whether."""
    if isinstance(module, StableActivation) or not _calls_functions(type(module)):  # type: ignore[arg-type]  # classes are hashable
        return False
    forward, mode = module.forward, StableFunctions()

    def stable(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    module.forward = stable
    return True


def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    count = flat.numel()
    if count % _VECTOR:
        flat = pad(flat, (0, -count % _VECTOR))
    parts = [function(flat[at : at + _PART]) for at in range(0, max(count, 1), _PART)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[:count].view(x.shape)


@cache
def _calls_functions(kind: Any) -> bool:
    """Return whether the forward of a class of modules calls elementwise functions."""
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return False
    return not kind.__module__.startswith("torch.") and _CALLED.search(source) is not None
