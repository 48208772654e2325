"""Read checkpoints with FP8 weights (e4m3) in the forms that are published.

| form | its configuration | scales beside `X.weight` |
|---|---|---|
| compressed-tensors | `quant_method: compressed-tensors`, 8-bit floats | `X.weight_scale`: one, [columns, 1], blocks |
| DeepSeek's blocks | `quant_method: fp8`, `weight_block_size` | `X.weight_scale_inv` [columns / 128, inputs / 128] |
| a scale a tensor | `quant_method: fp8` without blocks | `X.weight_scale`: a number |
| FBGEMM | `quant_method: fbgemm_fp8` | `X.weight_scale` [columns, 1] |

In all of them a weight is its value times its scale. What a configuration declares for input activations is what is
computed (`declared_activations`). Scales of keys and values are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from worker.engine.errors import ModelRefused
from worker.engine.quantization.activations import ActivationScheme
from worker.engine.quantization.weights import BLOCK, QuantizedWeight, attach

_SCALES = ("_scale", "_scale_inv")  # endings that the name of a weight's scale has behind the weight's own
_OF_ACTIVATIONS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".input_scale_ub")
_STATIC_SCALE = ".input_scale"
_NAN_BITS = 0x7F
_FBGEMM_BOUND = 1200.0  # of transformers' FbgemmFp8Config
_STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that are multiplied in one product


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


def declared_activations(quantization_config: Mapping[str, Any]) -> ActivationScheme | None:
    """Return how a checkpoint that `is_fp8` declares its input activations; None: they keep the dtype of the model.

    A static scheme has the scale 0 here: each layer has its own. Raises ModelRefused, with what would work, for a
    scheme that is not computed.
    """
    method = quantization_config.get("quant_method")
    if method == "fbgemm_fp8":
        return ActivationScheme(bound=float(quantization_config.get("activation_scale_ub") or _FBGEMM_BOUND))
    if method == "fp8":
        return _of_fp8(quantization_config)
    groups = quantization_config["config_groups"].values()
    found = {_of_group(group["weights"], group.get("input_activations")) for group in groups}
    if len(found) > 1:
        raise _not_computed("config_groups: the groups declare different input activations")
    return found.pop()


def _of_fp8(declared: Mapping[str, Any]) -> ActivationScheme:
    static = declared.get("activation_scheme") == "static"
    if static and declared.get("weight_block_size"):
        raise _not_computed("activation_scheme: static, beside weights in blocks")
    powers = declared.get("scale_fmt") == "ue8m0"
    return ActivationScheme(static_scale=0.0) if static else ActivationScheme(powers_of_two=powers)


def _of_group(weights: Mapping[str, Any], activations: Any) -> ActivationScheme | None:
    """Return the scheme of a group of compressed-tensors; dynamic scales are those of rows, never of a whole batch."""
    if not activations:
        return None
    if not isinstance(activations, Mapping):
        raise _not_computed(f"input_activations: {activations}")
    given = {"type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False, **activations}
    kind = (given["type"], given.get("num_bits", 8), given["symmetric"])
    if kind != ("float", 8, True):
        raise _not_computed(f"input_activations: {kind[0]}{kind[1]}{'' if kind[2] else ', not symmetric'}")
    blocks, strategy = weights["strategy"] == "block", given["strategy"]
    if given["dynamic"] is True and (strategy, given.get("group_size")) == ("group", BLOCK) and blocks:
        return ActivationScheme()
    if given["dynamic"] is True and strategy in ("token", "tensor") and not blocks:
        return ActivationScheme()
    if given["dynamic"] is False and strategy == "tensor" and not blocks:
        return ActivationScheme(static_scale=0.0)
    how = "dynamic" if given["dynamic"] else "static"
    raise _not_computed(
        f"input_activations: {how}, strategy {strategy}, beside weights of strategy {weights['strategy']}"
    )


def _not_computed(declared: str) -> ModelRefused:
    return ModelRefused(
        f"the checkpoint's quantization_config declares {declared}, which this version does not compute; it computes "
        f"FP8 with a dynamic scale a token (in blocks: for each {BLOCK} inputs) or a static scale a tensor. Choose "
        "such a checkpoint, or the model in bfloat16 with BASIC_QUANTIZATION=fp8-dynamic"
    )


def read_fp8(
    files: Sequence[Path], dtype: torch.dtype, activations: ActivationScheme | None = None
) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """Read weight files: all weights in `dtype`, by name, and those in FP8 as they are stored.

    `activations` is the scheme of their rows. Raises ModelRefused, with its name, for a weight in FP8 without a fitting
    scale or with NaN.
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
        scheme = _with_static_scale(name, activations, found.get(name.removesuffix(".weight") + _STATIC_SCALE))
        stored[name] = replace(_with_scale(name, tensor, scale), activations=scheme)
        weights[name] = stored[name].dequantized(dtype)
    return weights, stored


def attach_all(model: nn.Module, stored: Mapping[str, QuantizedWeight]) -> None:
    """Give the linear layers of a loaded model their FP8 weights.

    Weights that are in another kind of layer, such as stacked experts, stay in the model's dtype. Raises ModelRefused
    if layers that are multiplied together round their rows in different ways; of static scales they use the largest.
    """
    layers = dict(model.named_modules())
    linear = {name: layer for name, layer in layers.items() if type(layer) is nn.Linear}
    held = {name.removesuffix(".weight"): weight for name, weight in stored.items()}
    held = {name: weight for name, weight in held.items() if name in linear}
    for parent in {name.rpartition(".")[0] for name in held}:
        for stack in _STACKS:
            _share_rows([name for part in stack if (name := f"{parent}.{part}") in linear], held)
    for name, weight in held.items():
        if linear[name].weight.shape == weight.values.shape:
            attach(linear[name], weight)


def _share_rows(names: Sequence[str], held: dict[str, QuantizedWeight]) -> None:
    """Give layers that are multiplied together one scheme of their rows."""
    schemes = {held[name].activations if name in held else None for name in names}
    if len(schemes) <= 1:
        return
    static = [scheme.static_scale for scheme in schemes if scheme is not None and scheme.static_scale is not None]
    if len(static) < len(schemes):
        raise ModelRefused(
            f"{', '.join(names)} are multiplied together, and only some of them have FP8 input activations; set "
            "BASIC_QUANTIZATION=fp8 for activations in the dtype of the model"
        )
    for name in names:
        held[name] = replace(held[name], activations=ActivationScheme(static_scale=max(static)))


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dictionary
                yield name, opened.get_tensor(name)


def _with_static_scale(name: str, scheme: ActivationScheme | None, given: Tensor | None) -> ActivationScheme | None:
    if scheme is None or scheme.static_scale is None:
        return scheme
    scale = float(given) if given is not None and given.numel() == 1 else 0.0
    if not 0.0 < scale < float("inf"):
        raise ModelRefused(
            f"{name} is FP8 with static input activations, and has no {name.removesuffix('.weight')}{_STATIC_SCALE} "
            "that is one positive number; download the model again"
        )
    return ActivationScheme(static_scale=scale)


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
