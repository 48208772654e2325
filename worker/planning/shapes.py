"""Sizes of a model from its configuration alone: parameters, how ranks split them, and KV bytes per token.

transformers builds the model on torch's `meta` device, without memory. Models that our kernels hold are split as their
shards are (engine/model/sharding.py), others by transformers' tensor parallel plan. So every architecture is counted
exactly, without formulas per architecture.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from worker.engine.errors import ModelRefused
from worker.engine.model.latent import holds_latents
from worker.engine.model.sharding import shared_axis, splits_exactly
from worker.engine.quantization.checkpoints import is_fp8
from worker.engine.quantization.weights import QuantizationMethod, quantizable
from worker.engine.shards.shard import parts_of, tp_sizes_of
from worker.loading.adapters import base_of, is_adapter

_PACKAGED = Path(__file__).with_name("configs")  # NAME.json: packaged configurations


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model that decide where it fits and how fast it runs."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_tokens: int  # maximum positions of the model
    split_parameters: int  # each rank of a tensor parallel replica holds a share of them
    whole_parameters: int  # every rank holds all of them
    embedding_parameters: int  # of the above; 0 if tied to the output. A step reads only the rows that it looks up
    fp8_parameters: int = 0  # of the above: those that BASIC_QUANTIZATION=fp8 rounds
    fp8_columns: int = 0  # of their layers; each has a scale
    has_fp8_weights: bool = False  # the checkpoint has FP8 weights
    latent_entry: int = 0  # numbers of a token's latent and rotated key in a layer, stored once; 0: keys and values
    base: str = ""  # the model that a LoRA adapter is merged into; its sizes are those of the adapter
    inner: int = 0  # inputs of the product behind the gated columns of a layer
    splits_exactly: bool = False  # ranks on GPUs have the bits of one: our kernels hold the model

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.split_parameters + self.whole_parameters

    def rank_parameters(self, ranks: int) -> int:
        """Return the number of parameters that each of `ranks` ranks holds."""
        return math.ceil(self.split_parameters / ranks) + self.whole_parameters + self._copied_output(ranks)

    def read_parameters(self, ranks: int) -> int:
        """Return the number of parameters that a step reads on each of `ranks` ranks."""
        if self.splits_exactly and ranks > 1:  # each rank has all embeddings
            return self.rank_parameters(ranks) - self.vocabulary * self.width
        return self.rank_parameters(ranks) - math.ceil(self.embedding_parameters / ranks)

    def _copied_output(self, ranks: int) -> int:
        """Return the parameters of a rank's share of an output layer that one GPU ties to the embeddings."""
        tied = self.embedding_parameters == 0
        return math.ceil(self.vocabulary / ranks) * self.width if tied and self.splits_exactly and ranks > 1 else 0

    @property
    def parts(self) -> int:
        """Parts in which products are summed that ranks split over their inputs."""
        return parts_of(self.heads, self.kv_heads)

    def kv_entries(self, ranks: int) -> int:
        """Return how many numbers the keys and values of one token have on each of `ranks` ranks."""
        if self.latent_entry and ranks == 1:
            return self.layers * self.latent_entry
        return 2 * self.layers * self.head_dim * (self.kv_heads // ranks)

    def splits(self, ranks: int) -> bool:
        """Return whether the heads split evenly over `ranks` ranks."""
        return ranks in self.widths

    @property
    def widths(self) -> list[int]:
        """Tensor parallel sizes that split the heads evenly."""
        return tp_sizes_of(self.heads, self.kv_heads)


def shape_of(name: str, base: str = "") -> ModelShape:
    """Return the shape of a packaged name, a directory with a config.json, or a hub id (its configuration only).

    A LoRA adapter has the shape of `base`, or of the base that it names. Raises ModelRefused if there is none, and
    SetupError for an adapter that can't be merged.
    """
    folder = Path(name).expanduser()
    if not is_adapter(folder):
        return shape_from_config(name, load_config(name))
    base = base or base_of(folder)
    if not base:
        raise ModelRefused(f"{name} is an adapter that names no base model; set BASIC_BASE_MODEL to it")
    return replace(shape_of(base), name=name, base=base)


def packaged_names() -> list[str]:
    """Return the names of the packaged configurations."""
    return sorted(file.stem for file in _PACKAGED.glob("*.json"))


def shape_from_config(name: str, config: PretrainedConfig) -> ModelShape:
    """Count the parameters of a configuration; raises ModelRefused if it is not a causal language model."""
    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM  # transformers leaves `from_config` untyped
            model = auto.from_config(config)
    except ValueError as error:
        raise ModelRefused(f"{name} can't be planned: {error}") from error
    text = config.get_text_config()
    ours = splits_exactly(text, 1, torch.bfloat16, torch.device("cuda"))
    plan: dict[str, str] = model.tp_plan or {}
    split = whole = 0
    for parameter, values in model.named_parameters():
        shared = _is_split_by_us(parameter) if ours else _is_split_by_transformers(parameter, plan)
        split, whole = split + shared * values.numel(), whole + (not shared) * values.numel()
    rounded = list(quantizable(model, QuantizationMethod.FP8))
    heads = int(text.num_attention_heads)
    embedding = 0 if text.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    return ModelShape(
        name=name,
        layers=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocabulary=int(text.vocab_size),
        context_tokens=int(text.max_position_embeddings),
        split_parameters=split,
        whole_parameters=whole,
        embedding_parameters=embedding,
        fp8_parameters=sum(layer.weight.numel() for layer in rounded),
        fp8_columns=sum(layer.out_features for layer in rounded),
        has_fp8_weights=is_fp8(getattr(config, "quantization_config", None) or {}),
        latent_entry=text.kv_lora_rank + text.qk_rope_head_dim if holds_latents(model) else 0,
        inner=int(getattr(text, "intermediate_size", None) or 0),
        splits_exactly=ours,
    )


def _is_split_by_us(parameter: str) -> bool:
    return shared_axis(parameter) is not None or parameter == "lm_head.weight"


def _is_split_by_transformers(parameter: str, plan: dict[str, str]) -> bool:
    module, _, kind = replace_layer_number_by_wildcard(parameter).rpartition(".")
    style = plan.get(module, "")
    return "colwise" in style or ("rowwise" in style and kind != "bias")


def load_config(name: str) -> PretrainedConfig:
    """Return the configuration of a packaged name, a directory with a config.json, or a hub id; raises ModelRefused."""
    packaged = _PACKAGED / f"{name.rpartition('/')[2]}.json"
    directory = Path(name).expanduser()
    try:
        if packaged.is_file() and not directory.is_dir():
            fields = json.loads(packaged.read_text())
            config: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
            return config
        location = str(directory) if directory.is_dir() else name
        read: PretrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
        return read
    except (OSError, ValueError) as error:
        known = ", ".join(packaged_names())
        raise ModelRefused(
            f"can't read a configuration of {name}; give a directory with a config.json, the id of a model on a "
            f"reachable hub, or one of: {known}"
        ) from error
