"""Incomplete or damaged checkpoints, and those of other models, are refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import save_tiny
from worker.engine.errors import ModelRefused
from worker.engine.model import checkpoint
from worker.engine.model.loading import load
from worker.loading.drafts import refuse_unsupported_draft

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def configure(folder: Path, **changes: Any) -> None:
    said = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in said.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelRefused) as refused:
        load(str(folder), dtype=torch.float32, device=CPU)
    said = str(refused.value)
    assert "\n" not in said
    return said


def test_missing_weights_are_refused_by_name(saved: Path) -> None:
    rewrite(saved, lambda w: {key: value for key, value in w.items() if "layers.1.mlp" not in key})
    assert "lacks weights of a LlamaForCausalLM: model.layers.1.mlp.down_proj.weight" in refusal(saved)


def test_weights_that_the_model_does_not_have_are_refused_by_name(saved: Path) -> None:
    rewrite(saved, lambda w: w | {"v_head.summary.weight": torch.zeros(1, 48)})
    assert "has weights that do not belong to a LlamaForCausalLM: v_head.summary.weight" in refusal(saved)


def test_weights_of_another_size_are_refused_by_name(saved: Path) -> None:
    configure(saved, intermediate_size=96)
    assert "model.layers.0.mlp.down_proj.weight is 48x64 in the file and 48x96 by the configuration" in refusal(saved)


@pytest.mark.parametrize(
    "kind", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForRewardModel"]
)
def test_a_model_for_another_task_is_refused(saved: Path, kind: str) -> None:
    configure(saved, architectures=[kind])
    assert f"is a {kind}, which writes no text" in refusal(saved)


def test_tied_embeddings_are_not_missing_weights(saved: Path) -> None:
    rewrite(saved, lambda w: {key: value for key, value in w.items() if key != "lm_head.weight"})
    configure(saved, tie_word_embeddings=True)
    load(str(saved), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", {}),
        ("model.layers.0.attention.masked_bias", {}),
        ("mtp.fc.weight", {}),
        ("model.layers.2.mlp.up_proj.weight", {"num_nextn_predict_layers": 1}),
        ("vision_tower.blocks.0.weight", {}),
    ],
)
def test_tensors_outside_the_text_model_are_ignored(saved: Path, key: str, changes: dict[str, Any]) -> None:
    rewrite(saved, lambda w: w | {key: torch.zeros(8)})
    configure(saved, **changes)
    load(str(saved), dtype=torch.float32, device=CPU)


def test_a_layer_beyond_the_configuration_is_refused(saved: Path) -> None:
    configure(saved, num_hidden_layers=1)
    assert "model.layers.1" in refusal(saved)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    for length in (len(whole) // 2, 100, 4, 0):
        (saved / WEIGHTS).write_bytes(whole[:length])
        assert "model.safetensors is damaged or truncated" in refusal(saved)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_named(saved: Path, name: str) -> None:
    (saved / name).write_text(LFS)
    assert f"{name} is a Git LFS pointer" in refusal(saved)


def test_a_missing_shard_is_named(saved: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    (saved / WEIGHTS).rename(saved / "model-00001-of-00002.safetensors")
    assert "has none of these files" in refusal(saved)
    assert "model-00002-of-00002.safetensors" in refusal(saved)


def test_a_directory_without_a_whole_model_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS).rename(saved / "pytorch_model.bin")
    assert "is a pickle, which is never loaded" in refusal(saved)
    (saved / "pytorch_model.bin").unlink()
    assert "has no weights" in refusal(saved)
    (saved / "config.json").rename(saved / "adapter_config.json")
    assert "is an adapter, not a whole model" in refusal(saved)
    (saved / "config.json").write_text("{ half")
    assert "holds a model and an adapter" in refusal(saved)
    (saved / "adapter_config.json").unlink()
    (saved / WEIGHTS).touch()
    assert "damaged" in refusal(saved)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")


def test_a_model_that_needs_remote_code_is_refused(saved: Path) -> None:
    configure(saved, model_type="of_tomorrow", auto_map={"AutoModelForCausalLM": "modeling.M"})
    assert "is a of_tomorrow, which needs remote code" in refusal(saved).replace("an of", "a of")


@pytest.mark.parametrize(
    ("config", "keys", "kind"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, ["fc.weight"], "an EAGLE-3 head"),
        ({"model_type": "llama"}, ["midlayer.mlp.up_proj.weight", "d2t", "t2d"], "an EAGLE-3 head"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, ["fc.weight"], "an EAGLE-1 or EAGLE-2 head"),
        ({"speculators_model_type": "eagle3"}, ["fc.weight"], "an EAGLE-3 head"),
        ({"speculators_model_type": "mtp"}, ["fc.weight"], "a draft of the speculators library (mtp)"),
        ({"medusa_num_heads": 2}, [], "a set of Medusa heads"),
        ({}, ["0.0.linear.weight", "1.0.linear.weight"], "a set of Medusa heads"),
        ({"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator"}, [], "an MLP speculator"),
        ({"model_type": "x"}, ["speculator.emb.0.weight"], "an MLP speculator"),
        ({"hydra_num_heads": 4}, [], "a set of Hydra heads"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_draft_heads_for_other_programs_are_refused_by_kind(
    tmp_path: Path, config: dict[str, Any], keys: list[str], kind: str, pickled: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {key: torch.zeros(2) for key in [*keys, "layers.0.weight"]}
    torch.save(weights, tmp_path / "pytorch_model.bin") if pickled else save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ModelRefused) as refused:
        refuse_unsupported_draft(str(tmp_path))
    assert f"is {kind}, which this version can't run; set BASIC_DRAFT" in str(refused.value)
    assert f"is {kind}, a draft for another model" in refusal(tmp_path)


def test_a_language_model_is_not_taken_for_a_draft_head(saved: Path) -> None:
    refuse_unsupported_draft(str(saved))


def test_a_foreign_draft_head_is_refused_by_hub_id_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelRefused, match="someone/medusa is a set of Medusa heads"):
        refuse_unsupported_draft("someone/medusa")


def test_a_hub_id_that_is_not_downloaded_is_not_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refuse_unsupported_draft("someone/that-is-not-there")
    refuse_unsupported_draft("no hub id: at all")
