"""Read checkpoints with FP8 weights (e4m3) in the forms that are published.

| form | its configuration | scales beside `X.weight` |
|---|---|---|
| compressed-tensors | `quant_method: compressed-tensors`, 8-bit floats | `X.weight_scale`: one, [columns, 1], blocks |
| DeepSeek's blocks | `quant_method: fp8`, `weight_block_size` | `X.weight_scale_inv` [columns / 128, inputs / 128] |
| a scale a tensor | `quant_method: fp8` without blocks | `X.weight_scale`: a number |
| FBGEMM | `quant_method: fbgemm_fp8` | `X.weight_scale` [columns, 1] |

In all of them a weight is its value times its scale. Scales of activations and of keys and values are not used: both
keep the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from worker.engine.errors import ModelRefused
from worker.engine.quantization.weights import BLOCK, QuantizedWeight, attach

_SCALES = ("_scale", "_scale_inv")  # endings that the name of a weight's scale has behind the weight's own
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".input_scale_ub")
_NAN_BITS = 0x7F


def is_fp8(quantization_config: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's quantization configuration is of FP8 weights that `read_fp8` reads."""
    method = str(quantization_config.get("quant_method"))
    if method == "fbgemm_fp8":
        return True
    if method == "fp8":
        block = quantization_config.get("weight_block_size")
        return quantization_config.get("fmt", "e4m3") == "e4m3" and block in (None, [BLOCK, BLOCK], (BLOCK, BLOCK))
    groups = quantization_config.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, Mapping) or not groups:
        return False
    return all(isinstance(group, Mapping) and _is_fp8_group(group.get("weights")) for group in groups.values())


def _is_fp8_group(weights: Any) -> bool:
    """Return whether a group of compressed-tensors has weights in e4m3 with scales that we hold."""
    if not isinstance(weights, Mapping) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        return False
    blocks = weights.get("strategy") == "block" and weights.get("block_structure") in ([BLOCK, BLOCK], (BLOCK, BLOCK))
    return weights.get("strategy") in ("tensor", "channel") or blocks


def read_fp8(files: Sequence[Path], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """Read weight files: all weights in `dtype`, by name, and those in FP8 as they are stored.

    Raises ModelRefused, with its name, for a weight in FP8 without a fitting scale or with NaN.
    """
    found = dict(_tensors(files))
    scales = {name: found.pop(name) for name in list(found) if name.endswith(tuple(".weight" + end for end in _SCALES))}
    weights: dict[str, Tensor] = {}
    stored: dict[str, QuantizedWeight] = {}
    for name, tensor in found.items():
        if name.endswith(_OF_ACTIVATIONS):
            continue
        if tensor.dtype.itemsize != 1:
            weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            continue
        scale = next((scales[name + end] for end in _SCALES if name + end in scales), None)
        stored[name] = _with_scale(name, tensor, scale)
        weights[name] = stored[name].dequantized(dtype)
    return weights, stored


def attach_all(model: nn.Module, stored: Mapping[str, QuantizedWeight]) -> None:
    """Give the linear layers of a loaded model their FP8 weights.

    Weights that are in another kind of layer, such as stacked experts, stay in the model's dtype.
    """
    layers = dict(model.named_modules())
    for name, weight in stored.items():
        layer = layers.get(name.removesuffix(".weight"))
        if type(layer) is nn.Linear and layer.weight.shape == weight.values.shape:
            attach(layer, weight)


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dictionary
                yield name, opened.get_tensor(name)


def _with_scale(name: str, values: Tensor, scale: Tensor | None) -> QuantizedWeight:
    if values.dtype != torch.float8_e4m3fn or values.dim() != 2:
        kind = str(values.dtype).removeprefix("torch.")
        raise ModelRefused(
            f"{name} is {kind} with {values.dim()} dimensions; FP8 weights are read in e4m3, as matrices"
        )
    if scale is None:
        raise ModelRefused(f"{name} is FP8 and has no {name}_scale or {name}_scale_inv; download the model again")
    if bool((values.view(torch.uint8) & _NAN_BITS == _NAN_BITS).any()) or not bool(scale.float().isfinite().all()):
        raise ModelRefused(f"{name} has NaN among its FP8 weights or scales; download the model again")
    columns, inputs = values.shape
    wide = scale.float()
    if wide.numel() == 1:
        return QuantizedWeight(values, wide.reshape(1, 1).repeat(1, columns))
    if wide.numel() == columns and wide.shape[0] == columns:
        return QuantizedWeight(values, wide.reshape(1, columns))
    if list(wide.shape) == [-(-columns // BLOCK), -(-inputs // BLOCK)]:
        return QuantizedWeight(values, wide.repeat_interleave(BLOCK, 0)[:columns].T.contiguous())
    shape = "x".join(map(str, wide.shape))
    raise ModelRefused(
        f"{name} has a scale of shape {shape}, which is none of: one number, one a column, one for each "
        f"{BLOCK}x{BLOCK} weights; choose the model in bfloat16"
    )
