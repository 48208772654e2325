"""A head on disk: `config.json` with its shape and whose head it is, `draft.safetensors` with the weights.

A head is of use to one target only, so whatever differs is refused, by name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from worker.drafters.head_network import HeadNetwork, HeadShape
from worker.engine.errors import ModelRefused
from worker.engine.model.loading import embeddings

FORMAT = "basic-head-1"
_CONFIG, _WEIGHTS = "config.json", "draft.safetensors"
_TOKENS = "tokens"  # the tensor of the ids that can be proposed
_AGAIN = "take the folder again from its source, or train the head again"
_ROWS = 64  # of the embedding, that stand for the whole in a fingerprint


@dataclass(frozen=True, slots=True)
class TargetIdentity:
    """Which target, and which tokenizer, a head was trained for."""

    target: str
    architecture: str
    layers: int
    width: int
    vocabulary: int
    weights_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True, slots=True)
class Head:
    """A trained head, before it meets its target."""

    name: str
    network: HeadNetwork
    tokens: Tensor  # [n] int64, ascending


def target_identity(model: PreTrainedModel, name: str, vocabulary: dict[str, int]) -> TargetIdentity:
    """Return who a target is, from some of its weights and all of its `vocabulary`; before its layers are fused."""
    config = model.config.get_text_config()
    state = {"embedding": embeddings(model)[:_ROWS]} | {
        key: weight for key, weight in model.state_dict().items() if "norm" in key
    }
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    spelled = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]))
    return TargetIdentity(
        target=name,
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        weights_sha256=digest.hexdigest(),
        tokenizer_sha256=hashlib.sha256(spelled.encode()).hexdigest(),
    )


def is_head(folder: str) -> bool:
    """Return whether a directory holds a head, rather than a language model."""
    return str(_config(Path(folder)).get("format")).startswith("basic-head")


def write_head(folder: Path, network: HeadNetwork, tokens: Tensor, whose: TargetIdentity) -> list[Path]:
    """Write a head in bfloat16; return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().bfloat16().contiguous() for key, value in network.state_dict().items()}
    save_file(weights | {_TOKENS: tokens.int()}, folder / _WEIGHTS)
    said = {
        "format": FORMAT,
        "shape": network.shape.as_json(),
        "target": {name: getattr(whose, name) for name in TargetIdentity.__slots__},
        "sha256": file_sha256(folder / _WEIGHTS),
    }
    (folder / _CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    return [folder / _CONFIG, folder / _WEIGHTS]


def read_head(folder: str, whose: TargetIdentity) -> Head:
    """Read a head for a target; raises ModelRefused, with what differs and what to do, if it isn't whole or its."""
    said = _config(Path(folder))
    if said.get("format") != FORMAT:
        raise ModelRefused(f"{folder} is a head of format {said.get('format')!r}; this version reads {FORMAT!r}")
    try:
        shape, trained_for = HeadShape(**said["shape"] | {"taps": tuple(said["shape"]["taps"])}), said["target"]
        _refuse_other(folder, trained_for, whose)
        network = HeadNetwork(shape)
    except (KeyError, TypeError) as error:
        raise ModelRefused(
            f"{folder}/{_CONFIG} is not a head's: {error}; take the folder again from its source"
        ) from error
    weights = _weights(Path(folder), said.get("sha256"))
    tokens = weights.pop(_TOKENS).long()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelRefused(f"{folder}/{_WEIGHTS} does not fit its {_CONFIG}: {error}") from error
    return Head(Path(folder).name, network, tokens)


def file_sha256(file: Path) -> str:
    """Return a file's hash."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _refuse_other(folder: str, trained_for: dict[str, Any], whose: TargetIdentity) -> None:
    """Raise ModelRefused with the first thing that differs, the plainest first."""
    for name, what in (
        ("architecture", "architecture"),
        ("width", "hidden size"),
        ("layers", "number of layers"),
        ("vocabulary", "vocabulary size"),
        ("tokenizer_sha256", "tokenizer (its hash)"),
        ("weights_sha256", "weights (their hash)"),
    ):
        if trained_for[name] != getattr(whose, name):
            raise ModelRefused(
                f"{folder} can't draft for {whose.target}: it was trained for {trained_for['target']}, whose {what} is "
                f"{trained_for[name]}, and the target's is {getattr(whose, name)}; train one with "
                f"`basic draft train --target {whose.target} --out DIRECTORY`, or leave BASIC_DRAFT empty"
            )


def _weights(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    file = folder / _WEIGHTS
    if not file.exists():
        raise ModelRefused(f"{folder} has no {_WEIGHTS}; only safetensors are read, never a pickle; {_AGAIN}")
    if file_sha256(file) != sha256:
        raise ModelRefused(f"{file} is not the file that {_CONFIG} was written with: its SHA-256 differs; {_AGAIN}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ModelRefused(f"{file} is not whole: {error}; {_AGAIN}") from error
