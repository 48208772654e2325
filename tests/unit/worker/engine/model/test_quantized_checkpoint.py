"""A checkpoint of each published quantised format is refused by name, from its configuration files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import SetupError
from jobs.settings import JobsSettings
from worker.checks import checks
from worker.engine.errors import ModelRefused
from worker.engine.model import quantized_checkpoint
from worker.engine.model.loading import load
from worker.engine.model.quantized_checkpoint import gguf_type, refuse_quantized
from worker.loading import model_store

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48}
INT4_GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 128}}}

# Keys of published checkpoints: what config.json has as `quantization_config`, and the words of a refusal.
IN_CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}, "GPTQ 4-bit"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, "AWQ 4-bit"),
    "bnb-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes int8"),
    "bnb-nf4": (
        {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes NF4",
    ),
    "hqq": ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3}}}, "HQQ 3-bit"),
    "aqlm": ({"quant_method": "aqlm", "num_codebooks": 1, "nbits_per_codebook": 16}, "AQLM 16-bit"),
    "eetq": ({"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": None}, "EETQ int8"),
    "quanto": ({"quant_method": "quanto", "weights": "int4", "activations": None}, "quanto int4"),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 1}}},
        "torchao Int4WeightOnlyConfig",
    ),
    "torchao-before-0.10": ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao int8_weight_only"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": INT4_GROUPS},
        "compressed-tensors int4",
    ),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "MXFP4"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4"),
    "fp8-in-other-blocks": ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "FP8 in blocks of 64x64"),
    "vptq": ({"quant_method": "vptq", "config_for_layers": {}}, "VPTQ"),
    "spqr": ({"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, "shapes": {}}, "SpQR 3-bit"),
    "bitnet": ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, "BitNet"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "AutoRound 4-bit"),
    "quark": ({"quant_method": "quark", "global_quant_config": {}}, "Quark"),
    "exl2": ({"quant_method": "exl2", "bits": 4.25, "version": "0.0.18"}, "EXL2 4.25-bit"),
    "of-tomorrow": ({"quant_method": "of-tomorrow"}, "of-tomorrow"),
}
# Files of quantisers beside a config.json that says nothing.
IN_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "quantize_config.json": ({"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False}, "GPTQ 4-bit"),
    "quant_config.json": ({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "AWQ 4-bit"),
    "hf_quant_config.json": (
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None}},
        "ModelOpt W4A16_AWQ",
    ),
    "quanto_qmap.json": ({"model.layers.0.mlp": {"weights": "qint8", "activations": "none"}}, "quanto qint8"),
}


def folder(path: Path, files: dict[str, Any]) -> Path:
    """Write a directory with configuration files and no weights: a check that reads those fails."""
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelRefused) as refused:
        load(str(path), dtype=torch.float32, device=torch.device("cpu"))
    said = str(refused.value)
    assert "which this version can't run; choose the model in bfloat16" in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("kind", IN_CONFIG)
def test_a_format_that_config_json_names_is_refused_before_weights_are_read(kind: str, tmp_path: Path) -> None:
    quantized, name = IN_CONFIG[kind]
    folder(tmp_path, {"config.json": LLAMA | {"quantization_config": quantized}})
    assert f"has quantised weights ({name}, by its config.json)" in refusal(tmp_path)


@pytest.mark.parametrize("file", IN_FILES)
def test_a_format_that_a_file_of_its_quantiser_names_is_refused(file: str, tmp_path: Path) -> None:
    quantized, name = IN_FILES[file]
    folder(tmp_path, {"config.json": LLAMA, file: quantized})
    assert f"has quantised weights ({name}, by its {file})" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX 4-bit"),
        ({"text_config": LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 8}}}, "GPTQ 8-bit"),
        ({"compression_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}, "int-quantized"),
        ({"quip_params": {"codebook": "E8P12"}}, "QuIP#"),
    ],
)
def test_a_format_elsewhere_in_config_json_is_refused(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    folder(tmp_path, {"config.json": LLAMA | config})
    assert name in refusal(tmp_path)


def test_a_pull_and_the_doctor_name_the_format_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, {"config.json": LLAMA | {"quantization_config": IN_CONFIG["gptq"][0]}})
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SetupError, match="GPTQ 4-bit"):
        model_store.pull(str(tmp_path), tmp_path)
    monkeypatch.setenv("BASIC_TARGET", str(tmp_path))
    model_files = next(iter(checks(JobsSettings())))
    assert (model_files.status, "GPTQ 4-bit" in model_files.message) == ("problem", True)
    assert model_files.advice.startswith("choose the model in bfloat16")


def test_of_a_quantised_hub_model_no_weights_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, {"config.json": LLAMA | {"quantization_config": IN_CONFIG["awq"][0]}})
    monkeypatch.setattr(quantized_checkpoint, "cached_file", lambda _, file, **__: str(tmp_path / file))
    monkeypatch.setattr(model_store, "_pull_from_hub", lambda _: pytest.fail("weights were downloaded"))
    with pytest.raises(SetupError, match="someone/model-AWQ has quantised weights"):
        model_store.pull("someone/model-AWQ", tmp_path)


@pytest.mark.parametrize("found", [{}, {"config.json": LLAMA}, {"config.json": LLAMA | {"quantization_config": None}}])
def test_a_checkpoint_that_is_not_quantised_passes(found: dict[str, Any], tmp_path: Path) -> None:
    refuse_quantized(str(folder(tmp_path, found)))


def test_a_tensor_type_of_a_gguf_file_has_its_name() -> None:
    assert gguf_type("x.gguf holds tensors of ggml type 39, which") == "x.gguf holds tensors of type MXFP4, which"
