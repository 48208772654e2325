"""Every model that loads gives the logits of transformers; any other is refused with the difference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.models import packed, save_tiny, tiny
from worker.engine.cpu.fused_model import rotary_table
from worker.engine.cpu.kernels import kernels
from worker.engine.errors import ModelRefused
from worker.engine.model.backend import fuse_layers
from worker.engine.model.equivalence_check import CHECK_ENTRIES
from worker.engine.model.loading import load
from worker.engine.model.packed_model import PackedModel
from worker.engine.segments import chain

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.1] * 8,
    "long_factor": [4.0] * 8,
    "factor": 8.0,
}
GPT = {"vocab_size": 258, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}

EXACT: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "opt": {**SHAPE, "ffn_dim": 96},
    "mixtral": {**SHAPE, "num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": 8},
    "qwen3_moe": {**SHAPE, **EXPERTS, "head_dim": 32},
    "qwen2_moe": {**SHAPE, **EXPERTS, "shared_expert_intermediate_size": 32},
    "olmoe": {**SHAPE, **EXPERTS},
    "hunyuan_v1_moe": {  # its router asks for the dtype of its weights
        **SHAPE,
        "num_experts": 4,
        "moe_topk": [2, 2],
        "num_shared_expert": [1, 1],
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "phi3": {**SHAPE, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "codegen": ({**GPT, "rotary_dim": 8}, "computes attention by itself"),
    "xglm": (
        {"vocab_size": 258, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
        "computes attention by itself",
    ),
    "gpt_neox_japanese": ({**SHAPE, "intermediate_multiple_size": 2}, "computes attention by itself"),
    "openai-gpt": (GPT, "computes attention by itself"),
    "diffllama": ({**SHAPE, "num_key_value_heads": 2}, "called attention 4 times in 2 of its 2 layers"),
    "roberta": ({**SHAPE, "is_decoder": True}, "of plain rows are .* away from those of transformers' own forward"),
    "bert": (SHAPE, "away from those of transformers' own forward"),
    "moshi": ({**SHAPE, "sliding_window": 8}, "away from those of transformers' own forward"),
    "gptj": ({**GPT, "rotary_dim": 8}, "computes attention by itself"),
    "doge": ({**SHAPE, "num_key_value_heads": 2}, "passes a mask to attention"),
    "mpt": ({"vocab_size": 258, "d_model": 64, "n_heads": 4, "n_layers": 2}, "MptForCausalLM"),
    "rwkv": ({"vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 2}, "has no num_attention_heads"),
}


def saved(folder: Path, kind: str, shape: dict[str, Any]) -> PreTrainedModel:
    """Write a small random model of a kind, whose logits are far from flat."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape), dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.16)
    model.save_pretrained(folder)
    model.train(False)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("kind", EXACT)
def test_a_model_that_loads_gives_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    own: Any = saved(tmp_path, kind, EXACT[kind])
    model = load(str(tmp_path), dtype=torch.float32, device=CPU)
    fuse_layers(model)
    ids = [(7 * i) % 250 for i in range(34)]  # beyond a window, and a block of 32 entries
    ours = PackedModel(model, slots=2, capacity=100)
    first = replace(chain(1, 0, ids[:30], keep_last=True), keep=np.arange(30))
    steps = [first, *(chain(1, at, [ids[at]], keep_last=True) for at in range(30, 34))]
    logits = torch.cat([ours.forward([step]) for step in steps])
    with torch.no_grad():
        exact = own(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, exact, rtol=1e-3, atol=1e-3 * float(exact.std()))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_with_wrong_logits_is_refused_with_the_difference(kind: str, tmp_path: Path) -> None:
    shape, found = REFUSED[kind]
    saved(tmp_path, kind, shape)
    with pytest.raises(ModelRefused, match=found) as refused:
        load(str(tmp_path), dtype=torch.float32, device=CPU)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("slots", "paged"), [(1, False), (2, False), (4, True)])
def test_the_model_that_serves_is_checked_in_its_own_dtype(
    tmp_path: Path, dtype: torch.dtype, slots: int, paged: bool
) -> None:
    model = load(str(save_tiny(tmp_path, "qwen3")), dtype=dtype, device=CPU)
    if not paged:
        fuse_layers(model)
    PackedModel(model, slots=slots, capacity=64, paged=paged)
    check: Any = model.basic_equivalence_check
    model.basic_equivalence_check = replace(check, exact=check.exact.roll(1, dims=1))
    with pytest.raises(ModelRefused, match="is not exact when it is packed"):
        PackedModel(model, slots=slots, capacity=64, paged=paged)


def test_a_slot_too_short_for_the_check_serves(tmp_path: Path) -> None:
    model = load(str(save_tiny(tmp_path)), dtype=torch.float32, device=CPU)
    PackedModel(model, slots=1, capacity=CHECK_ENTRIES - 1)


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    model: Any = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="gives NaN"):
        load(str(tmp_path), dtype=torch.float32, device=CPU)


def test_the_check_leaves_windows_and_attention_as_they_were(tmp_path: Path) -> None:
    saved(tmp_path, "mistral", {**SHAPE, "num_key_value_heads": 2, "sliding_window": 100})
    model = load(str(tmp_path), dtype=torch.float32, device=CPU)
    assert model.config.sliding_window == 100
    assert packed(model).config is model.config


@pytest.mark.skipif(kernels(torch.float32) is None, reason="no compiled kernels")
def test_a_table_of_positions_is_not_changed_by_those_that_no_text_has() -> None:
    """A slot is longer than any sequence, and frequencies may depend on the largest position of the table."""
    model: Any = tiny()
    model.config.max_position_embeddings = 512
    model.config.rope_parameters = {**LONGROPE, "short_factor": [1.1] * 16, "long_factor": [4.0] * 16}
    body: Any = type(model.model)(model.config)
    short, _ = rotary_table(body, torch.zeros(1), 64)
    long, _ = rotary_table(body, torch.zeros(1), 100, 64)
    assert np.array_equal(short.numpy(), long[:64].numpy())
    assert len(long) == 100
