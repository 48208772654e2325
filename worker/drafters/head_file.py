"""Read and write draft heads: `config.json` with shape and target, `draft.safetensors` with the weights.

A head fits one target only. For any other it is refused, with the first property that differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from worker.drafters.block_network import BlockNetwork, BlockShape
from worker.drafters.eagle3_file import is_eagle3
from worker.drafters.head_network import HeadNetwork, HeadShape
from worker.engine.errors import ModelRefused
from worker.engine.model.checkpoint import folder_of, read_config
from worker.engine.model.loading import embeddings

HEAD_FORMAT, BLOCK_FORMAT = "basic-head-1", "basic-block-1"
_KINDS: dict[str, tuple[type[HeadShape], Callable[[Any], HeadNetwork]]] = {
    HEAD_FORMAT: (HeadShape, HeadNetwork),
    BLOCK_FORMAT: (BlockShape, BlockNetwork),
}
_CONFIG, _WEIGHTS = "config.json", "draft.safetensors"
_TOKENS = "tokens"  # name of the tensor of ids that can be proposed
_RETRY = "download the folder again, or train the head again"
_ROWS = 64  # rows of the embedding in the fingerprint of the weights


@dataclass(frozen=True, slots=True)
class TargetIdentity:
    """The target and the tokenizer that a head was trained for."""

    target: str
    architecture: str
    layers: int
    width: int
    vocabulary: int
    weights_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True, slots=True)
class Head:
    """A trained head as read from disk."""

    name: str
    network: HeadNetwork
    tokens: Tensor  # [n] int64, ascending


def target_identity(model: PreTrainedModel, name: str, vocabulary: dict[str, int]) -> TargetIdentity:
    """Return a target's identity, from some of its weights and all of its `vocabulary`.

    Call it before the layers are fused, which changes the weights.
    """
    config = model.config.get_text_config()
    state = {"embedding": embeddings(model)[:_ROWS]} | {
        key: weight for key, weight in model.state_dict().items() if "norm" in key
    }
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    encoded = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]))
    return TargetIdentity(
        target=name,
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        weights_sha256=digest.hexdigest(),
        tokenizer_sha256=hashlib.sha256(encoded.encode()).hexdigest(),
    )


def is_head(path: str) -> bool:
    """Return whether a directory or a downloaded hub id is a head that can be run, rather than a language model."""
    folder = folder_of(path)
    return folder is not None and (is_own_head(folder) or is_eagle3(folder))


def is_own_head(folder: Path) -> bool:
    """Return whether a directory holds a head that `basic draft train` wrote."""
    return str(read_config(folder).get("format")).startswith(("basic-head", "basic-block"))


def write_head(folder: Path, network: HeadNetwork, tokens: Tensor, target: TargetIdentity) -> list[Path]:
    """Write a head in bfloat16; return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().bfloat16().contiguous() for key, value in network.state_dict().items()}
    save_file(weights | {_TOKENS: tokens.int()}, folder / _WEIGHTS)
    config = {
        "format": BLOCK_FORMAT if isinstance(network, BlockNetwork) else HEAD_FORMAT,
        "shape": network.shape.as_json(),
        "target": {name: getattr(target, name) for name in TargetIdentity.__slots__},
        "sha256": file_sha256(folder / _WEIGHTS),
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return [folder / _CONFIG, folder / _WEIGHTS]


def read_head(folder: str, target: TargetIdentity) -> Head:
    """Read a head for a target. Raises ModelRefused if it is damaged or was trained for another one."""
    config = read_config(Path(folder))
    if config.get("format") not in _KINDS:
        known = " and ".join(map(repr, _KINDS))
        raise ModelRefused(f"{folder} is a head of format {config.get('format')!r}; this version reads {known}")
    shape_of, network_of = _KINDS[config["format"]]
    try:
        shape, trained_for = shape_of(**config["shape"] | {"taps": tuple(config["shape"]["taps"])}), config["target"]
        _refuse_other(folder, trained_for, target)
        network = network_of(shape)
    except (KeyError, TypeError) as error:
        raise ModelRefused(f"{folder}/{_CONFIG} is not the config of a head: {error}; {_RETRY}") from error
    weights = _weights(Path(folder), config.get("sha256"))
    tokens = weights.pop(_TOKENS).long()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelRefused(f"{folder}/{_WEIGHTS} does not fit its {_CONFIG}: {error}") from error
    return Head(Path(folder).name, network, tokens)


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _refuse_other(folder: str, trained_for: dict[str, Any], target: TargetIdentity) -> None:
    """Raise ModelRefused with the first property that differs, the most readable first."""
    for name, what in (
        ("architecture", "architecture"),
        ("width", "hidden size"),
        ("layers", "number of layers"),
        ("vocabulary", "vocabulary size"),
        ("tokenizer_sha256", "tokenizer (its hash)"),
        ("weights_sha256", "weights (their hash)"),
    ):
        if trained_for[name] != getattr(target, name):
            raise ModelRefused(
                f"{folder} can't draft for {target.target}: it was trained for {trained_for['target']}, whose {what} "
                f"is {trained_for[name]}, and the target's is {getattr(target, name)}; train one with "
                f"`basic draft train --target {target.target} --out DIRECTORY`, or leave BASIC_DRAFT empty"
            )


def _weights(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    file = folder / _WEIGHTS
    if not file.exists():
        raise ModelRefused(f"{folder} has no {_WEIGHTS}; other formats, such as pickles, are not read; {_RETRY}")
    if file_sha256(file) != sha256:
        raise ModelRefused(f"{file} was changed or cut off: its SHA-256 is not the one in {_CONFIG}; {_RETRY}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ModelRefused(f"{file} is damaged: {error}; {_RETRY}") from error
