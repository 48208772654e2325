"""Quantised checkpoints: name the format from its configuration files alone, before any weight is read.

Quantisers write their settings into `config.json` (`quantization_config`, or `text_config` of a model with several
parts), or into a file of their own. Each refusal names the format and what would work instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from worker.engine.errors import ModelRefused
from worker.engine.quantization.checkpoints import declared_activations, is_fp8

_CONFIG = "config.json"
_NAMES = {
    "aqlm": "AQLM",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "fouroversix": "Four Over Six",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "intel/auto-round": "AutoRound",
    "auto-round": "AutoRound",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quark": "Quark",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
# Where a format has its number of bits, and what else names it.
_BITS = ("bits", "w_bit", "nbits", "num_bits", "bits_per_weight", "nbits_per_codebook")
_INSTEAD = "choose the model in bfloat16, or a GGUF file of it, which is converted"

_Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantisation of a checkpoint, as its configuration says it."""

    method: str  # the field's name of it: GPTQ, AWQ …
    detail: str  # bits or type of the weights, "" if the configuration does not say
    file: str  # that says so

    def __str__(self) -> str:
        return f"{self.method} {self.detail}".rstrip()


def refuse_quantized(path: str) -> None:
    """Raise ModelRefused, with the format and what would work, for a quantised checkpoint.

    `path` is a directory or a hub id, of which only small configuration files are downloaded.
    """
    for file in (_CONFIG, *_OWN_FILES):
        given = _read(path, file)
        if given is None and file == _CONFIG and not Path(path).is_dir():
            return  # a hub id that can't be reached, or is no model: loading it says why
        found = None if given is None else quantization_of(given, file)
        if found is not None:
            raise ModelRefused(
                f"{path} has quantised weights ({found}, by its {found.file}), which this version can't run; {_INSTEAD}"
            )


def quantization_of(given: _Object, file: str = _CONFIG) -> Quantization | None:
    """Return the quantisation that a configuration file describes; None if it describes none, or one that is read.

    Raises ModelRefused for FP8 weights with input activations that are not computed.
    """
    if file in _OWN_FILES:
        return _OWN_FILES[file](given, file)
    for owner in (given, *(part for name in _PARTS if isinstance(part := given.get(name), Mapping))):
        ours = owner.get("quantization_config") or owner.get("compression_config")
        if isinstance(ours, Mapping) and ours:
            if not is_fp8(ours):
                return _by_method(ours, file)
            declared_activations(ours)
            return None
    if isinstance(given.get("quantization"), Mapping):
        return Quantization("MLX", _bits(given["quantization"]), file)
    if isinstance(given.get("quip_params"), Mapping):
        return Quantization("QuIP#", _bits(given["quip_params"]), file)
    return None


_PARTS = ("text_config", "llm_config", "language_config")


def _by_method(ours: _Object, file: str) -> Quantization:
    name = str(getattr(ours.get("quant_method"), "value", ours.get("quant_method")) or "unknown")
    reader = _METHODS.get(name)
    if reader is not None:
        return Quantization(*reader(ours), file)
    return Quantization(_NAMES.get(name, name), _bits(ours), file)


def _bits_and_bytes(ours: _Object) -> tuple[str, str]:
    in_4_bits = ours.get("load_in_4bit") or ours.get("_load_in_4bit")
    return "bitsandbytes", str(ours.get("bnb_4bit_quant_type", "fp4")).upper() if in_4_bits else "int8"


def _compressed_tensors(ours: _Object) -> tuple[str, str]:
    groups = ours.get("config_groups")
    weights = [g.get("weights") or {} for g in groups.values() if isinstance(g, Mapping)] if groups else []
    kinds = sorted({f"{w.get('type', 'int')}{w.get('num_bits', '')}" for w in weights if isinstance(w, Mapping)})
    return "compressed-tensors", ", ".join(kinds) or str(ours.get("format") or "")


def _named_types(method: str) -> Callable[[_Object], tuple[str, str]]:
    """Read formats whose weights have a type by name."""
    return lambda ours: (method, str(ours.get("weights") or ours.get("weight_format") or ""))


def _torchao(ours: _Object) -> tuple[str, str]:
    given = ours.get("quant_type")
    if isinstance(given, Mapping):
        given = next((v.get("_type") for v in given.values() if isinstance(v, Mapping)), None)
    return "torchao", str(given or "")


def _hqq(ours: _Object) -> tuple[str, str]:
    inner = ours.get("quant_config")
    weights = inner.get("weight_quant_params") if isinstance(inner, Mapping) else None
    return "HQQ", _bits(weights if isinstance(weights, Mapping) else ours)


def _model_opt(ours: _Object) -> tuple[str, str]:
    inner = ours.get("quantization")
    return "ModelOpt", str((inner if isinstance(inner, Mapping) else ours).get("quant_algo") or "")


def _fp8(ours: _Object) -> tuple[str, str]:
    blocks = ours.get("weight_block_size")
    return "FP8", f"in blocks of {'x'.join(map(str, blocks))}" if isinstance(blocks, list | tuple) else ""


def _own(method: str) -> Callable[[_Object, str], Quantization]:
    """Read a file of one quantiser, whose forks may write another method into it."""
    return lambda given, file: _by_method({"quant_method": method, **given}, file)


_METHODS: dict[str, Callable[[_Object], tuple[str, str]]] = {
    "bitsandbytes": _bits_and_bytes,
    "compressed-tensors": _compressed_tensors,
    "compressed_tensors": _compressed_tensors,
    "eetq": _named_types("EETQ"),
    "fp8": _fp8,
    "hqq": _hqq,
    "modelopt": _model_opt,
    "modelopt_fp4": _model_opt,
    "quanto": _named_types("quanto"),
    "torchao": _torchao,
}
# Files in which quantisers write their settings beside config.json.
_OWN_FILES: dict[str, Callable[[_Object, str], Quantization]] = {
    "quantize_config.json": _own("gptq"),
    "quant_config.json": _own("awq"),
    "hf_quant_config.json": lambda given, file: Quantization(*_model_opt(given), file),
    "quanto_qmap.json": lambda given, file: Quantization("quanto", _first_type(given), file),
}


def _first_type(given: _Object) -> str:
    return next((str(v["weights"]) for v in given.values() if isinstance(v, Mapping) and v.get("weights")), "")


def _bits(given: _Object) -> str:
    """Return the bits of a weight in words; "" if they are not said."""
    bits = next((given[name] for name in _BITS if isinstance(given.get(name), int | float)), None)
    return "" if bits is None else f"{bits:g}-bit"


def _read(path: str, file: str) -> _Object | None:
    """Return a configuration file of a directory or hub id as an object; None if there is none."""
    try:
        found = cached_file(
            path,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        given = None if found is None else json.loads(Path(found).read_text())
    except (OSError, ValueError):  # other checks name what is wrong with it
        return None
    return given if isinstance(given, Mapping) else None


def gguf_type(message: str) -> str:
    """Return transformers' message about a GGUF file with the name of a tensor type in place of its number."""
    from gguf import GGMLQuantizationType

    names = {str(kind.value): kind.name for kind in GGMLQuantizationType}
    return re.sub(r"ggml type (\d+)", lambda found: f"type {names.get(found[1], found[1])}", message)
