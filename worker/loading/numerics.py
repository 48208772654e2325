"""The numerics of a loaded model: everything that fixes the bits of its texts, beside the requests themselves.

Two workers with one fingerprint write the same text for the same request. Threads, batch, drafts and memory are no part
of it: they change no bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel

from storage.numerics import Numerics
from worker.engine.model import arithmetic
from worker.engine.model.architecture import has_long_factors, long_text_tokens
from worker.engine.quantization.weights import QuantizationMethod
from worker.text.codec import Codec

_NAME_CHARS: Final = 16
_TOKENIZER_FILES: Final = (
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
)
# Instructions that change sums or roundings of the compiled kernels or of torch's.
_INSTRUCTIONS: Final = re.compile(
    r"fma|avx2?|avx_\w+|avx10\w*|avx512(f|bw|dq|vl|_bf16|_fp16|_vnni)|amx_\w+|asimd(dp|hp)?|bf16|i8mm|(sve|sme)2?"
)
# Variables that make the libraries of torch choose other kernels.
_CHOICES: Final = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
)


def numerics_of(
    model: PreTrainedModel,
    codec: Codec,
    folder: Path,
    *,
    weights: str,
    quantization: QuantizationMethod | None,
    kv_dtype: torch.dtype,
    ranks: int,
    depends_on_batch: bool,
) -> Numerics:
    """Return the numerics of a model in `folder`, whose layers are fused; `weights` is the hash of its files."""
    gpu = model.device.type == "cuda"
    options = codec.options
    parts: dict[str, Any] = {
        "weights": _short(weights),
        "config": _hash(_config(folder)),
        "tokenizer": _hash_files(_tokenizer_files(folder)),
        "text": _hash(
            (sorted(options.eos_ids), options.vocabulary, options.special_in_content, options.reasoning_parser)
        ),
        "dtype": _name(model.dtype),
        "quantization": None if quantization is None else str(quantization),
        "kv_dtype": _name(kv_dtype),
        "device": _gpu(model.device) if gpu else _cpu(),
        "ranks": ranks,
        "kernels": arithmetic.gpu_version() if gpu else arithmetic.cpu_version(model.dtype),
        "libraries": _libraries(gpu=gpu),
        "depends_on_batch": depends_on_batch,
    }
    if has_long_factors(model.config.get_text_config()):
        parts["rotary"] = "long factors"
    elif long_text_tokens(model.config.get_text_config()) is not None:
        parts["rotary"] = "factors by text"
    return Numerics(f"fp_{_hash(parts)}", parts)


def _libraries(*, gpu: bool) -> str:
    """Return the libraries whose products and functions decide bits, and what was set to choose their kernels."""
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    if gpu:
        versions.append(f"CUDA {torch.version.cuda}")
    return ", ".join([*versions, *(f"{name}={os.environ[name]}" for name in _CHOICES if os.environ.get(name))])


def _gpu(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


def _cpu() -> str:
    """Return the instruction set that the compiled kernels and torch compute with, and who made the processor."""
    facts = _cpu_facts()
    named = facts.get("flags") or facts.get("Features") or ""
    found = sorted(filter(_INSTRUCTIONS.fullmatch, set(named.split())))
    vendor = facts.get("vendor_id") or facts.get("CPU implementer") or platform.machine()
    return f"cpu {vendor} {torch.backends.cpu.get_cpu_capability()}: {' '.join(found) or platform.processor()}"


def _cpu_facts() -> dict[str, str]:
    """Return what /proc/cpuinfo says of the first processor; nothing where it is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _config(folder: Path) -> dict[str, Any]:
    """Return the configuration without what only says who has written it."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in config.items() if name not in ("transformers_version", "_name_or_path")}


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _TOKENIZER_FILES for path in folder.rglob(pattern) if path.is_file()})


def _hash_files(files: Iterable[Path]) -> str:
    return _hash([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])


def _hash(value: object) -> str:
    return _short(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())


def _short(digest: str) -> str:
    return digest[:_NAME_CHARS]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
