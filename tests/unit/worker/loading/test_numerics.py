"""The fingerprint of what fixes the bits of a text: it changes with each part, and with nothing else."""

from __future__ import annotations

import hashlib
import os
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from storage.numerics import Numerics
from tests.models import byte_tokenizer, tiny
from worker.engine.quantization.weights import QuantizationMethod
from worker.loading.numerics import numerics_of
from worker.loading.weights_hash import weights_hash
from worker.text.codec import Codec


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny(vocab=258)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "transformers_version": "1"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def named(model: PreTrainedModel, folder: Path, **changed: Any) -> Numerics:
    codec = Codec(byte_tokenizer(), frozenset({256}), changed.pop("context", 100), 258, **changed.pop("codec", {}))
    parts = {"weights": "ab", "quantization": None, "kv_dtype": torch.bfloat16, "ranks": 1, "depends_on_batch": False}
    return numerics_of(model, codec, folder, **parts | changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "cd"},
        {"quantization": QuantizationMethod.INT8},
        {"kv_dtype": torch.float32},
        {"ranks": 2},
        {"depends_on_batch": True},
        {"codec": {"special_in_content": "control"}},
    ],
)
def test_what_changes_bits_changes_the_fingerprint(
    model: PreTrainedModel, folder: Path, changed: dict[str, Any]
) -> None:
    assert named(model, folder, **changed).fingerprint != named(model, folder).fingerprint


def test_what_changes_no_bit_changes_no_fingerprint(model: PreTrainedModel, folder: Path) -> None:
    first = named(model, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    (folder / "config.json").write_text('{"transformers_version": "2", "hidden_size": 8}')
    assert named(model, folder, context=50) == first
    torch.set_num_threads(threads)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    assert named(model, folder).fingerprint != first.fingerprint
    assert first.parts["device"].startswith("cpu "), "the instruction set, by name"


def test_a_weight_file_is_read_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    read: list[str] = []
    digest = hashlib.file_digest

    def counted(file: BufferedReader, name: str) -> hashlib._Hash:
        read.append("once")
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)

    def hashed() -> str:
        return weights_hash([file], tmp_path / "cache", lambda _: None)

    first = hashed()
    assert (hashed(), read) == (first, ["once"])
    file.write_bytes(b"Weights")
    os.utime(file, ns=(1, 1))
    assert hashed() != first
    assert len(read) == 2


def test_a_file_of_the_hub_is_not_read_because_its_name_is_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = tmp_path / ("a" * 64)
    blob.write_bytes(b"anything")
    file = tmp_path / "model.safetensors"
    file.symlink_to(blob)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert weights_hash([file], tmp_path / "cache", lambda _: None)


def test_weights_are_hashed_where_no_cache_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    said: list[str] = []
    assert weights_hash([file], file, said.append) == weights_hash([file], tmp_path / "cache", said.append)
    assert said == [], "only gigabytes are announced"
