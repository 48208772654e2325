"""A model with layers offloaded to disk by accelerate decodes like one in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import tiny
from tests.unit.worker.engine.harness import (
    decode,
    drafter,
    engine,
    options,
    outputs,
    plain_texts,
    sequences,
)
from worker.engine.errors import ModelRefused
from worker.engine.model.loading import load, output_weights
from worker.engine.model.offload import OffloadOptions, is_offloaded
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode

CPU = torch.device("cpu")
_LAYER = 48 * 64 * 4 * 3 + 48 * 32 * (6 + 2 + 2 + 6) * 4  # bytes of a layer's matrices
MEMORY: dict[str | int, int | str] = {"cpu": int(1.5 * _LAYER)}  # the rest is on disk


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_with_layers_on_disk_writes_the_same_text(saved: Path, tmp_path: Path) -> None:
    model = load(str(saved), dtype=torch.float32, device=CPU, offload=OffloadOptions(tmp_path / "offload", MEMORY))
    assert is_offloaded(model)
    assert "disk" in model.hf_device_map.values()  # type: ignore[operator]
    spread = sequences()
    results = decode(engine(PackedModel(model, slots=4, capacity=512), drafter("same"), options(Mode.PAPER)), spread)
    assert outputs(spread) == plain_texts()
    assert any(result.stats.accepted_tokens for result in results)


def test_a_draft_head_cannot_read_weights_on_disk(saved: Path, tmp_path: Path) -> None:
    model = load(str(saved), dtype=torch.float32, device=CPU, offload=OffloadOptions(tmp_path / "offload", MEMORY))
    with pytest.raises(ModelRefused, match="suffix"):
        output_weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_layers_on_disk_is_checked_like_any_other(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    memory: dict[str | int, int | str] = {"cpu": int(1.5 * _LAYER * dtype.itemsize / 4)}
    model = load(str(saved), dtype=dtype, device=CPU, offload=OffloadOptions(tmp_path / "offload", memory))
    assert is_offloaded(model)
    PackedModel(model, slots=4, capacity=64)
    check: Any = model.basic_equivalence_check
    model.basic_equivalence_check = replace(check, exact=-check.exact)
    with pytest.raises(ModelRefused, match="away from those of transformers' own forward"):
        PackedModel(model, slots=4, capacity=64)
