"""A model whose layers lie partly on disk, as accelerate lays them out, decodes as if it lay in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import packed, tiny
from tests.unit.worker.engine.harness import decode, drafter, engine, options, outputs, sequences
from worker.engine.errors import ModelRefused
from worker.engine.language_model import PackedModel, embeddings, load
from worker.engine.options import Mode
from worker.engine.spread import Spread, is_spread

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_layers_on_disk_write_the_text_of_layers_in_memory(saved: Path, tmp_path: Path) -> None:
    largest = 48 * 64 * 4 * 3 + 48 * 32 * (6 + 2 + 2 + 6) * 4  # bytes of a layer's products
    memory: dict[str | int, int | str] = {"cpu": int(1.5 * largest)}
    model = load(str(saved), dtype=torch.float32, device=CPU, spread=Spread(tmp_path / "offload", memory))
    assert is_spread(model)
    assert "disk" in model.hf_device_map.values()  # type: ignore[operator]
    spread, whole = sequences(), sequences()
    results = decode(engine(PackedModel(model, slots=4, capacity=512), drafter("same"), options(Mode.PAPER)), spread)
    decode(engine(packed(tiny("llama")), None, options(Mode.PLAIN)), whole)
    assert outputs(spread) == outputs(whole)
    assert any(result.numbers.accepted_tokens for result in results)


def test_a_head_can_not_read_weights_that_are_on_disk(saved: Path, tmp_path: Path) -> None:
    model = load(str(saved), dtype=torch.float32, device=CPU, spread=Spread(tmp_path / "offload", {"cpu": "1KB"}))
    with pytest.raises(ModelRefused, match="suffix"):
        embeddings(model)
