"""The quantisation of weights and KV that the settings ask for: what it can be combined with, and what it left."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from jobs.errors import SetupError
from worker.engine.cpu.fused_layers import are_known, decoder_layers
from worker.engine.kv.fp8 import store_kv_in_fp8
from worker.engine.model.backend import kernels_for
from worker.engine.paged.attention import gpu_kernels_for
from worker.engine.quantization.weights import QuantizationMethod, quantization_method
from worker.settings import WorkerSettings

_MIB = 1 << 20


def chosen_quantization(settings: WorkerSettings, device: torch.device) -> QuantizationMethod | None:
    """Return the method of BASIC_QUANTIZATION; None: weights as the checkpoint has them.

    Raises SetupError, with what works, for a method that can't run on the device or with the other settings.
    """
    if settings.quantization == "auto":
        return None
    method = QuantizationMethod(settings.quantization)
    if settings.tp > 1 or settings.device_map:
        raise SetupError(
            f"BASIC_QUANTIZATION={method} works on one device that holds the whole model; start with --tp 1 and "
            "without BASIC_DEVICE_MAP, or leave BASIC_QUANTIZATION unset"
        )
    if method is QuantizationMethod.INT8 and device.type != "cpu":
        raise SetupError(
            "BASIC_QUANTIZATION=int8 runs on a CPU only; on a GPU set BASIC_QUANTIZATION=fp8, or leave it unset"
        )
    return method


def choose_kv_dtype(settings: WorkerSettings, model: PreTrainedModel) -> None:
    """Make a loaded model hold its keys and values as BASIC_KV_DTYPE says; call it before its layers are fused.

    Raises SetupError, with what works, for settings that FP8 can't be combined with.
    """
    if settings.kv_dtype == "auto":
        return
    if settings.device_map:
        raise SetupError(
            "BASIC_KV_DTYPE=fp8 needs layers that stay on one device; start without BASIC_DEVICE_MAP, or leave "
            "BASIC_KV_DTYPE unset"
        )
    store_kv_in_fp8(model)


def refuse_unpacked(model: PreTrainedModel, name: str) -> None:
    """Raise SetupError if no kernel can run a model's quantised weights; call it before the layers are fused."""
    method = quantization_method(model)
    if method is None:
        return
    if model.device.type == "cpu":
        runs = kernels_for(model) is not None
        needed = "the compiled CPU kernels, which need gcc"
    else:
        layers = decoder_layers(model)
        runs = gpu_kernels_for(model.device) is not None and layers is not None and are_known(layers)
        needed = "fused layers, which are made for Llama, Mistral, Qwen2 and Qwen3"
    if not runs:
        raise SetupError(
            f"{name} with {method} weights needs {needed}; choose the model in bfloat16 and leave BASIC_QUANTIZATION "
            "unset"
        )


def weights_sentence(stored_bytes: Mapping[str, int]) -> str:
    """Return a sentence about the weights in memory, such as `Weights: 129 MiB int8, 54 MiB bfloat16`."""
    parts = sorted(stored_bytes.items(), key=lambda part: -part[1])
    return "Weights: " + ", ".join(f"{size / _MIB:,.1f} MiB {dtype}" for dtype, size in parts)
