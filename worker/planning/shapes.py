"""What a model weighs, from its configuration alone: parameters, which of them are split over ranks, KV bytes a token.

transformers builds the model without memory (on torch's `meta` device) and names its own tensor parallel plan, so that
every architecture it knows is counted exactly and no formula of ours can drift from it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from worker.engine.errors import ModelRefused

_PACKAGED = Path(__file__).with_name("configs")  # NAME.json: configurations that need no download


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that decide where it fits and how fast it runs."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_tokens: int  # the longest text it was made for
    split_parameters: int  # each rank of a tensor parallel replica holds its share
    whole_parameters: int  # every rank holds all of them
    embedding_parameters: int  # of the above; a step reads only the rows it looks up, unless they make the logits too

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.split_parameters + self.whole_parameters

    def rank_parameters(self, ranks: int) -> int:
        """Return how many parameters one of `ranks` ranks holds."""
        return math.ceil(self.split_parameters / ranks) + self.whole_parameters

    def read_parameters(self, ranks: int) -> int:
        """Return how many parameters a step of one of `ranks` ranks multiplies with."""
        return self.rank_parameters(ranks) - math.ceil(self.embedding_parameters / ranks)

    def kv_entries(self, ranks: int) -> int:
        """Return how many numbers the keys and values of one token are, on one of `ranks` ranks."""
        return 2 * self.layers * self.head_dim * (self.kv_heads // ranks)

    def splits(self, ranks: int) -> bool:
        """Return whether its heads can be dealt out to so many ranks."""
        return self.kv_heads % ranks == 0 and self.heads % ranks == 0

    @property
    def widths(self) -> list[int]:
        """Numbers of ranks that its heads can be dealt out to."""
        return [ranks for ranks in range(1, self.kv_heads + 1) if self.splits(ranks)]


def shape_of(name: str) -> ModelShape:
    """Return the shape of a packaged name, a directory with a config.json, or a hub id (its configuration only).

    Raises ModelRefused, with what to do, when there is none.
    """
    return shape_from_config(name, load_config(name))


def packaged_names() -> list[str]:
    """Return the names whose configurations come with bASIC."""
    return sorted(file.stem for file in _PACKAGED.glob("*.json"))


def shape_from_config(name: str, config: PretrainedConfig) -> ModelShape:
    """Count the parameters of a configuration; raises ModelRefused for what is no causal language model."""
    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM  # transformers leaves `from_config` untyped
            model = auto.from_config(config)
    except ValueError as error:
        raise ModelRefused(f"{name} can't be planned: {error}") from error
    plan: dict[str, str] = model.tp_plan or {}
    split = whole = 0
    for parameter, values in model.named_parameters():
        module, _, kind = replace_layer_number_by_wildcard(parameter).rpartition(".")
        style = plan.get(module, "")
        shared = "colwise" in style or ("rowwise" in style and kind != "bias")
        split, whole = split + shared * values.numel(), whole + (not shared) * values.numel()
    text = config.get_text_config()
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
    )


def load_config(name: str) -> PretrainedConfig:
    """Return the configuration of a packaged name, a directory with a config.json, or a hub id; raises ModelRefused."""
    packaged = _PACKAGED / f"{name.rpartition('/')[2]}.json"
    directory = Path(name).expanduser()
    try:
        if packaged.is_file() and not directory.is_dir():
            said = json.loads(packaged.read_text())
            config: PretrainedConfig = AutoConfig.for_model(said.pop("model_type"), **said)
            return config
        place = str(directory) if directory.is_dir() else name
        read: PretrainedConfig = AutoConfig.from_pretrained(place, trust_remote_code=False)
        return read
    except (OSError, ValueError) as error:
        known = ", ".join(packaged_names())
        raise ModelRefused(
            f"{name} has no configuration to read: give a directory with its config.json, a hub id that can be "
            f"reached, or one of: {known}"
        ) from error
