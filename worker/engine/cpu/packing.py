"""Replace what a CPU model multiplies by packed weights, so that a row's bits do not depend on its batch."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from worker.engine.cpu.experts import packed_experts
from worker.engine.cpu.kernels import kernels
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.cpu.stable_functions import StableActivation, is_activation, make_stable
from worker.engine.cpu.stable_weight import StableWeight, packed_weight

_KEPT = (nn.Embedding, nn.modules.conv._ConvNd, PackedLinear)  # parameters that no row is multiplied with


def pack(model: nn.Module) -> int:
    """Replace every layer with a weight of a CPU model by a packed one; return how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            packed = _packed(parent, name, child)
            if packed is not None:
                setattr(parent, name, packed)
                count += 1
    for module in model.modules():
        if not isinstance(module, _KEPT):
            _wrap_weights(module)
    make_stable(model)
    return count


def _packed(parent: nn.Module, name: str, child: nn.Module) -> nn.Module | None:
    if type(child) is Conv1D:
        return packed_weight(child.weight.detach().t().contiguous(), child.bias)
    if is_activation(child):
        return StableActivation(child)
    if type(child) is not nn.Linear:
        return packed_experts(child)
    # bfloat16 is packed in pairs; a parent that reads the weight multiplies it by itself
    if child.in_features % 2 or f"{name}.weight" in _weights_read(type(parent)):  # type: ignore[arg-type]  # hashable
        return None
    own = kernels(child.weight.dtype)  # a router may be in float32 where the model is in bfloat16
    # Logits stay float32: rounding them would create ties.
    return None if own is None else PackedLinear([child], own, floats=name == "lm_head" and child.bias is None)


def _wrap_weights(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dim() in (2, 3) and not isinstance(parameter, StableWeight):
            weight: Tensor = parameter.detach()
            setattr(module, name, StableWeight(weight))


@cache
def _weights_read(kind: Any) -> frozenset[str]:
    """Return the weights of children that the forward of a class multiplies by itself, as `child.weight`."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"linear\([^\n]*self\.(\w+\.weight)", source))
