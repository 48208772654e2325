"""A checkpoint in each published FP8 form loads as it is: the same logits as its weights, value times scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import packed, save_tiny
from tests.unit.worker.engine.cpu.test_kernels import TEXT, compiled
from worker.engine.errors import ModelRefused
from worker.engine.model.backend import fuse_layers, stored_bytes
from worker.engine.model.loading import load
from worker.engine.quantization.checkpoints import is_fp8
from worker.engine.quantization.weights import QuantizationMethod
from worker.engine.segments import chain

CPU = torch.device("cpu")
PROMPT = [chain(0, 0, TEXT[:20], keep_last=True)]


def groups(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}}


CONFIGS: dict[str, dict[str, Any]] = {
    "compressed-tensors, a column": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups("channel"),
        "ignore": ["lm_head"],
    },
    "compressed-tensors, a tensor": {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": groups("tensor"),
        "ignore": ["lm_head"],
    },
    "compressed-tensors, blocks": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups("block", block_structure=[128, 128]),
        "ignore": ["lm_head"],
    },
    "DeepSeek's blocks": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "a static scale a tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "FBGEMM": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
}


def scales_of(form: str, columns: int, inputs: int) -> dict[str, Tensor]:
    """Return the tensors that a form has beside a weight, by the ending of their names."""
    if "blocks" in form:
        scale = torch.rand(-(-columns // 128), -(-inputs // 128)) / 100
        return {"weight_scale_inv" if "DeepSeek" in form else "weight_scale": scale}
    if "tensor," in form or "a tensor" in form:
        return {"weight_scale": torch.rand(()) / 100, "input_scale": torch.ones(())}
    return {"weight_scale": torch.rand(columns, 1).to(torch.bfloat16) / 100}


def save_fp8(folder: Path, form: str) -> dict[str, Tensor]:
    """Save a tiny checkpoint in a form; return its weights as float32."""
    save_tiny(folder, hidden_size=192, intermediate_size=272)
    tensors, exact = load_file(folder / "model.safetensors"), {}
    torch.manual_seed(0)
    for name in list(tensors):
        weight = tensors[name]
        if not name.endswith("proj.weight"):
            continue
        columns, inputs = weight.shape
        values = torch.randn(columns, inputs).mul(40).to(torch.float8_e4m3fn)
        extra = scales_of(form, columns, inputs)
        scale = next(part for end, part in extra.items() if end.startswith("weight_scale")).float()
        if "blocks" in form:
            scale = scale.repeat_interleave(128, 0)[:columns].repeat_interleave(128, 1)[:, :inputs]
        exact[name] = values.float() * scale
        tensors |= {name: values} | {name.removesuffix("weight") + end: part for end, part in extra.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, CONFIGS[form])
    return exact


def set_config(folder: Path, quantized: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))


@pytest.mark.parametrize("form", CONFIGS)
def test_a_published_form_loads_as_it_is_and_is_held_as_fp8(form: str, tmp_path: Path) -> None:
    compiled()
    exact = save_fp8(tmp_path, form)
    model = load(str(tmp_path), dtype=torch.float32, device=CPU)
    for name, weight in exact.items():
        assert torch.equal(model.get_parameter(name), weight), name
    plain = packed(load(str(tmp_path), dtype=torch.float32, device=CPU), capacity=64)  # without fused layers
    fuse_layers(model)
    assert stored_bytes(model)["float8_e4m3fn"] >= sum(weight.numel() for weight in exact.values())
    ours = packed(model, capacity=64)
    assert torch.allclose(ours.forward(PROMPT), plain.forward(PROMPT), atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "compressed-tensors", "config_groups": groups("group", group_size=32)},
        {"quant_method": "compressed-tensors", "config_groups": groups("channel") | groups("channel", num_bits=4)},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "gptq", "bits": 8},
        {},
    ],
)
def test_another_form_is_not_taken_for_one_of_these(config: dict[str, Any]) -> None:
    assert not is_fp8(config)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t, k: t.pop(k + "_scale"), "has no"),
        (lambda t, k: t.update({k + "_scale": torch.ones(3, 1)}), "scale of shape 3x1, which is none of"),
        (lambda t, k: t.update({k: torch.full_like(t[k].float(), torch.nan).to(t[k].dtype)}), "NaN among"),
        (lambda t, k: t.update({k: t[k].float().to(torch.float8_e5m2)}), "is float8_e5m2"),
    ],
    ids=["no scale", "another scale", "NaN", "e5m2"],
)
def test_a_damaged_weight_is_refused_by_name(damage: Any, said: str, tmp_path: Path) -> None:
    save_fp8(tmp_path, "compressed-tensors, a column")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    damage(tensors, name)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelRefused, match=rf"{name} .*{said}"):
        load(str(tmp_path), dtype=torch.float32, device=CPU)


def test_fp8_weights_are_neither_rounded_again_nor_split_over_ranks(tmp_path: Path) -> None:
    save_fp8(tmp_path, "FBGEMM")
    with pytest.raises(
        ModelRefused, match="FP8 weights, which can't be rounded to int8; leave BASIC_QUANTIZATION unset"
    ):
        load(str(tmp_path), dtype=torch.float32, device=CPU, quantization=QuantizationMethod.INT8)
    with pytest.raises(ModelRefused, match="one device holds whole; start with --tp 1"):
        load(str(tmp_path), dtype=torch.float32, device=CPU, ranks=2)
