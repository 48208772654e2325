"""Laws of head files: a head is read as it was written; damaged ones and those of another target are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.heads import TOKENS, block_network, network
from tests.models import tiny
from worker.drafters.head_file import TargetIdentity, is_head, read_head, target_identity, write_head
from worker.drafters.head_network import HeadNetwork
from worker.engine.errors import ModelRefused

VOCABULARY = {f"token {i}": i for i in range(61)}


@pytest.fixture
def target() -> TargetIdentity:
    return target_identity(tiny("llama"), "tiny", VOCABULARY)


@pytest.fixture(params=[network, block_network])
def made(request: pytest.FixtureRequest) -> HeadNetwork:
    net: HeadNetwork = request.param(tiny("llama"))
    return net


@pytest.fixture
def folder(tmp_path: Path, target: TargetIdentity, made: HeadNetwork) -> Path:
    write_head(tmp_path / "head", made, TOKENS, target)
    return tmp_path / "head"


def test_a_head_comes_back_as_it_was_written(folder: Path, target: TargetIdentity, made: HeadNetwork) -> None:
    head = read_head(str(folder), target)
    assert is_head(str(folder))
    assert head.tokens.tolist() == TOKENS.tolist()
    assert head.network.shape == made.shape
    for name, weight in made.state_dict().items():
        assert torch.equal(head.network.state_dict()[name], weight.bfloat16().float()), name


def test_a_directory_that_holds_something_else_is_no_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_head(str(tmp_path))
    assert not is_head(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "qwen2"}, "architecture is llama, and the target's is qwen2"),
        ({"width": 64}, "hidden size is 48, and the target's is 64"),
        ({"layers": 30}, "number of layers is 2"),
        ({"vocabulary": 152064}, "vocabulary size is 61, and the target's is 152064"),
        ({"tokenizer_sha256": "0" * 64}, "tokenizer"),
        ({"weights_sha256": "0" * 64}, "weights"),
    ],
)
def test_a_head_of_another_target_is_refused_with_what_differs(
    folder: Path, target: TargetIdentity, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ModelRefused, match=said) as refused:
        read_head(str(folder), replace(target, **change))  # type: ignore[arg-type]
    assert "basic draft train" in str(refused.value)


def test_the_same_shape_with_other_weights_is_another_target() -> None:
    assert target_identity(tiny("llama", seed=1), "tiny", VOCABULARY) != target_identity(
        tiny("llama"), "tiny", VOCABULARY
    )


def test_a_file_that_was_cut_off_or_changed_is_refused(folder: Path, target: TargetIdentity) -> None:
    file = folder / "draft.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-100], whole[:-1] + b"\x01", b""):
        file.write_bytes(broken)
        with pytest.raises(ModelRefused, match="its SHA-256 is not the one"):
            read_head(str(folder), target)


def test_a_broken_file_with_the_right_hash_is_refused_too(folder: Path, target: TargetIdentity) -> None:
    import hashlib

    (folder / "draft.safetensors").write_bytes(b"not safetensors")
    said = json.loads((folder / "config.json").read_text())
    said["sha256"] = hashlib.sha256(b"not safetensors").hexdigest()
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModelRefused, match="is damaged"):
        read_head(str(folder), target)


def test_a_pickle_is_not_read(folder: Path, target: TargetIdentity) -> None:
    (folder / "draft.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelRefused, match="pickles, are not read"):
        read_head(str(folder), target)


@pytest.mark.parametrize("missing", ["shape", "target"])
def test_a_config_without_a_part_is_refused(folder: Path, target: TargetIdentity, missing: str) -> None:
    said = json.loads((folder / "config.json").read_text())
    del said[missing]
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModelRefused, match=missing):
        read_head(str(folder), target)


@pytest.mark.parametrize(
    ("name", "value", "said"), [("depth", 10**9, "from 2 to 16, not 1000000000"), ("rank", "8", "not '8'")]
)
def test_a_block_of_impossible_size_is_refused(
    tmp_path: Path, target: TargetIdentity, name: str, value: object, said: str
) -> None:
    write_head(tmp_path, block_network(tiny("llama")), TOKENS, target)
    config = json.loads((tmp_path / "config.json").read_text())
    config["shape"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match=said):
        read_head(str(tmp_path), target)
