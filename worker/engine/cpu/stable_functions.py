"""Elementwise functions whose bits do not depend on where in a tensor an element lies.

torch computes sigmoid, tanh, cos and others of whole vectors by one algorithm and of the rest of a tensor, or of each
thread's part of it, by another, which rounds differently. So a row's bits would depend on the rows beside it. Here a
tensor is padded to whole vectors and computed in parts that one thread computes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

_VECTOR = 64  # elements: two vectors of the widest instructions, which torch computes at once
_PART = 16384  # elements that torch gives to one thread, of every function: of GELU the fewest
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


def make_stable(model: nn.Module) -> None:
    """Run the forwards of modules whose own code calls elementwise functions with stable ones.

    The modules that those call run without, unless their own code calls some, too: each call of torch takes twice as
    long in Python while the functions are replaced.
    """
    callers = [module for module in model.modules() if _calls_functions(type(module))]  # type: ignore[arg-type]
    for module in callers:
        _wrap(module, StableFunctions)
    for module in {called: None for caller in callers for called in _children(caller)}:
        _wrap(module, _without)


def _wrap(module: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
    forward = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    module.forward = wrapped


def _without() -> AbstractContextManager[Any]:
    """Leave the innermost mode if it is `StableFunctions`."""
    active = _get_current_function_mode()  # type: ignore[no-untyped-call]
    return _pop_mode_temporarily() if isinstance(active, StableFunctions) else nullcontext()


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif not isinstance(child, StableActivation):
            yield child


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
    ours = kind.__module__.startswith(("torch.", "worker."))
    return not ours and _CALLED.search(source) is not None
