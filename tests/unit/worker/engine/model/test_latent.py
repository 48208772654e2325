"""Latent attention stores each token's latent once, and computes what transformers' expanded keys and values give."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests import families
from tests.models import packed
from tests.unit.worker.engine.bits import TEXT, check_moves, check_rows, check_threads
from tests.unit.worker.engine.cpu.test_kernels import compiled
from worker.engine.kv.fp8 import store_kv_in_fp8
from worker.engine.model.architecture import kv_bytes_per_token, latent_dim_of
from worker.engine.model.backend import fuse_layers, stored_bytes
from worker.engine.model.latent import LatentHeads
from worker.engine.model.loading import load
from worker.engine.model.packed_model import PackedModel
from worker.engine.segments import chain
from worker.planning.shapes import shape_from_config

LAYERS, LATENT, ROTATED = 2, 48, 16
SIZES = {"kv_lora_rank": LATENT, "qk_rope_head_dim": ROTATED, "num_hidden_layers": LAYERS}
KINDS = ("deepseek_v2", "deepseek_v3", "minicpm3")


def loaded(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with TemporaryDirectory() as folder:
        families.model_of(kind, **SIZES).save_pretrained(folder)
        return load(str(Path(folder)), dtype=dtype, device=torch.device("cpu"))


@cache
def quick(dtype: torch.dtype, in_fp8: bool = False) -> PackedModel:
    compiled(dtype)
    model = loaded("deepseek_v3", dtype)
    if in_fp8:
        store_kv_in_fp8(model)
    fuse_layers(model)
    return packed(model, capacity=160)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_takes_one_latent_in_each_layer_and_logits_are_those_of_expanded_heads(kind: str) -> None:
    model, own = loaded(kind), families.model_of(kind, **SIZES)
    assert latent_dim_of(model) == LATENT
    token_bytes = LAYERS * (LATENT + ROTATED) * 4
    assert kv_bytes_per_token(model) == token_bytes == shape_from_config(kind, own.config).kv_entries(1) * 4
    with torch.no_grad():
        expected = own(input_ids=torch.tensor([TEXT[:30]]), use_cache=False).logits[0, -1]
    step = [chain(0, 0, TEXT[:30], keep_last=True)]
    for paged in (False, True):
        plain = PackedModel(model, slots=1, capacity=64, cpu_kernels=False, paged=paged)
        assert torch.allclose(plain.forward(step)[0], expected, atol=1e-3)
        kv: Any = plain.kv
        assert len(kv._pair.stores) == 1, "keys and values are one"
    fuse_layers(model)
    assert kv_bytes_per_token(model) == token_bytes, "latents of whole panels are not padded"
    ours = PackedModel(model, slots=1, capacity=64)
    assert torch.allclose(ours.forward(step)[0], expected, atol=1e-3)
    kv = ours.kv
    assert sum(store.nbytes for store in kv.stores) == 64 * token_bytes


@pytest.mark.parametrize(("dtype", "in_fp8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_row_has_the_same_bits_alone_in_a_batch_in_a_tree_and_in_any_chunk(dtype: torch.dtype, in_fp8: bool) -> None:
    check_rows(quick(dtype, in_fp8))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    check_threads(quick(torch.bfloat16))


@pytest.mark.parametrize("in_fp8", [False, True])
def test_an_accepted_path_and_a_copied_prefix_keep_their_latents(in_fp8: bool) -> None:
    check_moves(quick(torch.bfloat16, in_fp8))


def test_absorbed_weights_are_held_once() -> None:
    compiled()
    model = loaded("deepseek_v3")
    before = sum(parameter.nbytes for parameter in model.parameters())
    fuse_layers(model)
    assert sum(isinstance(module, LatentHeads) for module in model.modules()) == LAYERS
    assert sum(stored_bytes(model).values()) <= 1.2 * before, "packed weights are padded to panels"
    assert not any("kv_b_proj" in name for name, _ in model.named_parameters())
