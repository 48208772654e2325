"""Read EAGLE-3 heads as they are published: SafeAILab, SpecForge and AngelSlim, and the speculators library.

All have one decoder layer that reads three layers of the target. They differ in the names of the weights, in the number
that stands for a tapped layer, and in norms that the configuration announces.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from worker.drafters.eagle3_network import Eagle3Network, Eagle3Shape
from worker.engine.errors import ModelRefused
from worker.engine.model.checkpoint import EAGLE_3, as_model_refused, draft_kind, read_config

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length of the text
_LAYER_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "vocab_size")
_OPTIONAL = ("attention_bias", "mlp_bias", "hidden_act", "max_position_embeddings")
_IGNORED = ("verifier_lm_head.", "verifier_norm.", "rotary_emb.")  # of the target, or computed
_TOKEN_KEYS = ("d2t", "draft_id_to_target_id")  # target id minus draft id, for each draft id
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What a head must fit."""

    name: str
    layers: int
    width: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Eagle3Head:
    """A published head as read from disk."""

    name: str
    network: Eagle3Network
    tokens: Tensor  # [n] int64, ascending: ids that it can propose
    output: Tensor | None  # output weights [n, width] of these; None: the target's
    embedding: Tensor | None  # [target's vocabulary, width]; None: the target's


def is_eagle3(folder: Path) -> bool:
    """Return whether a directory holds an EAGLE-3 head in a published format."""
    return draft_kind(folder) == EAGLE_3


def read_eagle3(folder: Path, target: TargetShape) -> Eagle3Head:
    """Read a published head. Raises ModelRefused if it is damaged or does not fit the target."""
    config = read_config(folder)
    weights = _weights(folder)
    with as_model_refused(f"{folder}/config.json does not describe an EAGLE-3 head"):
        shape = _shape(folder, config, weights, target)
        network = Eagle3Network(shape)
    tokens, output = _tokens(folder, weights, shape, target), weights.pop("lm_head.weight", None)
    embedding = weights.pop("embed_tokens.weight", None)
    _require(output is None or len(output) == len(tokens), folder, "output rows", output, len(tokens))
    if embedding is None and shape.width != target.width:
        raise ModelRefused(
            f"{folder} has no embeddings, and is {shape.width} wide where {target.name} is {target.width}"
        )
    _require(
        embedding is None or len(embedding) == target.vocabulary, folder, "embeddings", embedding, target.vocabulary
    )
    if output is None and len(tokens) != target.vocabulary:
        raise ModelRefused(f"{folder} has no output weights (lm_head.weight) for its {len(tokens)} tokens; {_AGAIN}")
    _load(folder, network, weights)
    order = tokens.argsort()
    return Eagle3Head(
        name=folder.name,
        network=network,
        tokens=tokens[order],
        output=None if output is None else output[order],
        embedding=embedding,
    )


def _shape(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], target: TargetShape) -> Eagle3Shape:
    layer: Mapping[str, Any] = config.get("transformer_layer_config") or config
    missing = [name for name in _LAYER_FIELDS if not isinstance(layer.get(name), int | float)]
    if missing:
        raise ModelRefused(f"{folder}/config.json lacks {', '.join(missing)}; {_AGAIN}")
    if layer.get("model_type", "llama") != "llama":
        raise ModelRefused(f"{folder} has a layer of {layer['model_type']}; heads with a Llama layer can be run")
    if (config.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        raise ModelRefused(f"{folder} reads no layers of the target (use_aux_hidden_state is false): not supported")
    if layer["vocab_size"] != target.vocabulary:
        raise _unfit(folder, target, "vocabulary", layer["vocab_size"], target.vocabulary)
    taps, fc = _taps(folder, config, target), weights.get("fc.weight")
    if fc is None or fc.shape[1] % len(taps):
        raise ModelRefused(f"{folder} has no fc.weight for {len(taps)} layers of a target; {_AGAIN}")
    width = fc.shape[1] // len(taps)
    if width != target.width:
        raise _unfit(folder, target, "hidden size", width, target.width)
    llama = _llama(folder, layer)
    return Eagle3Shape(
        layer=llama,
        kv_heads=llama.num_key_value_heads or llama.num_attention_heads,
        head_dim=llama.head_dim or llama.hidden_size // llama.num_attention_heads,
        target_width=width,
        taps=taps,
        vocabulary=int(config.get("draft_vocab_size") or layer["vocab_size"]),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        norm_before_fc="input_norm.weight" in weights,
        fc_norm="fc_norm.0.weight" in weights,
        norm_output=bool(config.get("norm_output", False)),
    )


def _llama(folder: Path, layer: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration of the decoder layers; raises ModelRefused for positions that depend on the text."""
    scaling = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    rope = {"rope_theta": layer.get("rope_theta", 10_000.0), "rope_type": kind or "default", **scaling}
    if rope["rope_type"] not in _ROPE_TYPES:
        raise ModelRefused(
            f"{folder} has rotary embeddings of type {rope['rope_type']}; {', '.join(_ROPE_TYPES)} are known"
        )
    heads = int(layer["num_attention_heads"])
    return LlamaConfig(
        hidden_size=int(layer["hidden_size"]),
        intermediate_size=int(layer["intermediate_size"]),
        num_hidden_layers=int(layer.get("num_hidden_layers", 1)),
        num_attention_heads=heads,
        num_key_value_heads=int(layer.get("num_key_value_heads") or heads),
        head_dim=int(layer.get("head_dim") or layer["hidden_size"] // heads),
        rms_norm_eps=float(layer["rms_norm_eps"]),
        rope_parameters=rope,
        vocab_size=1,  # embeddings are kept apart
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{name: layer[name] for name in _OPTIONAL if layer.get(name) is not None},
    )


def _taps(folder: Path, config: Mapping[str, Any], target: TargetShape) -> tuple[int, ...]:
    """Return the target layers whose outputs the head reads.

    Layer k of vLLM and of the speculators library is the input of layer k, the output of the one before; SGLang and
    SpecForge, which write `eagle_config`, name the layer whose output is read. Without numbers all read the inputs of
    layer 2, the middle one, and the last but two (SafeAILab/EAGLE).
    """
    inputs = config.get("eagle_aux_hidden_state_layer_ids")
    outputs = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not inputs and outputs:
        taps = tuple(int(layer) for layer in outputs)
    else:
        taps = tuple(int(layer) - 1 for layer in inputs or (2, target.layers // 2, target.layers - 3))
    if not all(0 <= layer < target.layers for layer in taps) or len(set(taps)) < len(taps):
        raise ModelRefused(
            f"{folder} can't draft for {target.name}: it reads the outputs of layers {', '.join(map(str, taps))}, and "
            f"the target has the layers 0 to {target.layers - 1}"
        )
    return taps


def _tokens(folder: Path, weights: dict[str, Tensor], shape: Eagle3Shape, target: TargetShape) -> Tensor:
    """Return the target's id of each token that the head proposes [n], in the order of its output rows."""
    offsets = next((weights.pop(key) for key in _TOKEN_KEYS if key in weights), None)
    allowed = weights.pop("t2d", None)
    if offsets is not None:
        tokens = torch.arange(len(offsets)) + offsets.long()
    elif allowed is not None:
        tokens = allowed.nonzero().flatten()
    else:
        tokens = torch.arange(shape.vocabulary)
    if len(tokens) != shape.vocabulary:
        raise ModelRefused(
            f"{folder} maps {len(tokens)} tokens, and its draft_vocab_size is {shape.vocabulary}; {_AGAIN}"
        )
    if not len(tokens) or not 0 <= int(tokens.min()) <= int(tokens.max()) < target.vocabulary:
        raise ModelRefused(f"{folder} maps tokens outside of {target.name}'s {target.vocabulary} ids; {_AGAIN}")
    if len(set(tokens.tolist())) < len(tokens):
        raise ModelRefused(f"{folder} maps two tokens to one id of {target.name}; {_AGAIN}")
    return tokens


def _load(folder: Path, network: Eagle3Network, weights: Mapping[str, Tensor]) -> None:
    """Load the weights; raises ModelRefused if some are missing, of another size, or unknown."""
    renamed = {_network_name(key): weight for key, weight in weights.items()}
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise ModelRefused(f"{folder} does not fit its config.json: {error}") from error


def _network_name(key: str) -> str:
    return f"model.{key}" if key.startswith(("layers.", "norm.")) else key


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights by name, without the prefixes in which the formats differ."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        found |= _read(file)
    if not found:
        raise ModelRefused(f"{folder} has no weights (*.safetensors or pytorch_model.bin); {_AGAIN}")
    short = {key.removeprefix("model.").replace("midlayer.", "layers.0."): weight for key, weight in found.items()}
    return {key: weight for key, weight in short.items() if not key.startswith(_IGNORED)}


def _read(file: Path) -> dict[str, Tensor]:
    """Read a file of weights. Of a pickle only tensors are read: `weights_only` runs no code of it."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelRefused(f"{file} is damaged, or holds more than weights: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelRefused(f"{file} holds more than weights; {_AGAIN}")
    return loaded


def _unfit(folder: Path, target: TargetShape, what: str, theirs: int, ours: int) -> ModelRefused:
    return ModelRefused(
        f"{folder} can't draft for {target.name}, whose {what} is {ours}: it was trained for {theirs}; "
        "choose a head that was trained for this target"
    )


def _require(fits: bool, folder: Path, what: str, weight: Tensor | None, wanted: int) -> None:
    if not fits and weight is not None:
        raise ModelRefused(f"{folder} has {len(weight)} {what}, and needs {wanted}; {_AGAIN}")
