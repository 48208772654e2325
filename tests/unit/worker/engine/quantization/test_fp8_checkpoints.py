"""A checkpoint in each published FP8 form loads as it is: the same logits as its weights, value times scale."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models import packed, save_tiny
from tests.unit.worker.engine.bits import TEXT
from tests.unit.worker.engine.cpu.test_kernels import compiled
from tests.unit.worker.engine.quantization.test_quantized_models import rows_of
from worker.engine.errors import ModelRefused
from worker.engine.model.backend import fuse_layers, stored_bytes
from worker.engine.model.loading import load
from worker.engine.quantization.activations import ActivationScheme
from worker.engine.quantization.checkpoints import declared_activations, is_fp8
from worker.engine.quantization.weights import QuantizationMethod, quantization_method, stored_weight
from worker.engine.segments import chain

CPU = torch.device("cpu")
DYNAMIC = ActivationScheme()
METHODS = {
    "compressed-tensors, a column, weights only": "fp8",
    "compressed-tensors, a tensor": "fp8-static",
    "a static scale a tensor": "fp8-static",
}
PROMPT = [chain(0, 0, TEXT[:20], keep_last=True)]


FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = {**FP8, "strategy": "token", "dynamic": True}
TENSOR = {**FP8, "strategy": "tensor", "dynamic": False}
GROUP = {**FP8, "strategy": "group", "group_size": 128, "dynamic": True}


def groups(strategy: str, activations: Any = None, **more: Any) -> dict[str, Any]:
    weights = {**FP8, "strategy": strategy, "dynamic": False, **more}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}


CONFIGS: dict[str, dict[str, Any]] = {
    "compressed-tensors, a column": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups("channel", TOKEN),
        "ignore": ["lm_head"],
    },
    "compressed-tensors, a column, weights only": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups("channel"),
        "ignore": ["lm_head"],
    },
    "compressed-tensors, a tensor": {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": groups("tensor", TENSOR),
        "ignore": ["lm_head"],
    },
    "compressed-tensors, blocks": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups("block", GROUP, block_structure=[128, 128]),
        "ignore": ["lm_head"],
    },
    "DeepSeek's blocks": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "DeepSeek's blocks, scales in powers of two": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
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
    plain = copy.deepcopy(model)  # without fused layers
    assert quantization_method(model) == METHODS.get(form, "fp8-dynamic")
    round_inputs(plain)
    fuse_layers(model)
    assert stored_bytes(model)["float8_e4m3fn"] >= sum(weight.numel() for weight in exact.values())
    ours = packed(model, capacity=64)
    assert torch.allclose(ours.forward(PROMPT), packed(plain, capacity=64).forward(PROMPT), atol=1e-3)


def round_inputs(model: nn.Module) -> None:
    """Make the layers of a model in transformers round their inputs as the checkpoint declares."""

    def rounded(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        weight = stored_weight(layer)
        assert weight is not None
        return rows_of(inputs[0][0], weight).to(inputs[0].dtype)[None]

    for layer in model.modules():
        weight = stored_weight(layer)
        if weight is not None and weight.activations is not None:
            layer.register_forward_pre_hook(rounded)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("compressed-tensors, a column", DYNAMIC),
        ("compressed-tensors, a column, weights only", None),
        ("compressed-tensors, a tensor", ActivationScheme(static_scale=0.0)),
        ("compressed-tensors, blocks", DYNAMIC),
        ("DeepSeek's blocks", DYNAMIC),
        ("DeepSeek's blocks, scales in powers of two", ActivationScheme(powers_of_two=True)),
        ("a static scale a tensor", ActivationScheme(static_scale=0.0)),
        ("FBGEMM", ActivationScheme(bound=1200.0)),
    ],
)
def test_activations_are_those_that_a_checkpoint_declares(form: str, expected: ActivationScheme | None) -> None:
    assert declared_activations(CONFIGS[form]) == expected


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("compressed-tensors, a column", "fp8"),
        ("compressed-tensors, a column, weights only", "fp8-dynamic"),
        ("a static scale a tensor", "fp8-dynamic"),
    ],
)
def test_a_setting_chooses_other_activations(form: str, wanted: str, tmp_path: Path) -> None:
    save_fp8(tmp_path, form)
    model = load(str(tmp_path), dtype=torch.float32, device=CPU, quantization=QuantizationMethod(wanted))
    assert quantization_method(model) == wanted


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"config_groups": groups("channel", {"num_bits": 8})}, "input_activations: int8"),
        ({"config_groups": groups("channel", {**TOKEN, "symmetric": False})}, "float8, not symmetric"),
        ({"config_groups": groups("channel", GROUP)}, "dynamic, strategy group, beside weights of strategy channel"),
        ({"config_groups": groups("channel", {**TOKEN, "dynamic": "local"})}, "strategy token"),
        ({"config_groups": groups("channel", 8)}, "input_activations: 8"),
        ({"config_groups": groups("channel", TOKEN) | {"group_1": groups("channel")["group_0"]}}, "different input"),
        ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]}, "static, beside"),
    ],
)
def test_activations_that_are_not_computed_are_refused_before_weights_are_read(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path)
    set_config(tmp_path, {"quant_method": "compressed-tensors", **config})
    with pytest.raises(ModelRefused, match=rf"{said}.*BASIC_QUANTIZATION=fp8-dynamic"):
        load(str(tmp_path), dtype=torch.float32, device=CPU)


ATTENTION = "model.layers.1.self_attn"


def change(folder: Path, changed: dict[str, Tensor]) -> None:
    save_file(load_file(folder / "model.safetensors") | changed, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({f"{ATTENTION}.k_proj.weight": torch.ones(64, 192)}, "k_proj, .* are multiplied together, and only some"),
        ({f"{ATTENTION}.o_proj.input_scale": torch.tensor(0.0)}, f"no {ATTENTION}.o_proj.input_scale"),
    ],
)
def test_static_scales_that_cannot_be_used_are_refused_by_name(
    changed: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    save_fp8(tmp_path, "a static scale a tensor")
    change(tmp_path, changed)
    with pytest.raises(ModelRefused, match=said):
        load(str(tmp_path), dtype=torch.float32, device=CPU)


def test_layers_that_are_multiplied_together_share_the_largest_of_their_static_scales(tmp_path: Path) -> None:
    save_fp8(tmp_path, "a static scale a tensor")
    change(tmp_path, {f"{ATTENTION}.k_proj.input_scale": torch.tensor(2.0)})
    layers = dict(load(str(tmp_path), dtype=torch.float32, device=CPU).named_modules())
    for part, scale in (("q_proj", 2.0), ("k_proj", 2.0), ("v_proj", 2.0), ("o_proj", 1.0)):
        weight = stored_weight(layers[f"{ATTENTION}.{part}"])
        assert weight is not None
        assert weight.activations == ActivationScheme(static_scale=scale)


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
