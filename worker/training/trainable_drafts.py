"""Pupils: the kinds of draft that can be trained. What learns, how it drafts by now, and how it is written down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from worker.drafters.head import HeadDrafter, PackedHead
from worker.drafters.head_file import write_head
from worker.drafters.head_network import HeadNetwork, HeadShape
from worker.drafters.model import ModelDrafter
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.speculation.drafting import Drafter
from worker.training.config import Kind, Recipe
from worker.training.losses import HeadLoss, ModelLoss, most_frequent
from worker.training.self_generated import Text
from worker.training.target import Target


class TrainableDraft(Protocol):
    """A draft, learning."""

    @property
    def student(self) -> nn.Module:
        """What learns."""

    @property
    def network(self) -> nn.Module:
        """The part of the student identity weights are kept."""

    def drafter(self, hidden: HiddenStates) -> Drafter:
        """Return a drafter with the weights as they are now."""

    def write(self, folder: Path) -> list[Path]:
        """Write the draft; return its files."""


def trainable_draft(target: Target, recipe: Recipe, texts: Sequence[Text]) -> TrainableDraft:
    """Return the draft of a recipe; a head can propose the tokens that stand most often in the answers of `texts`."""
    if recipe.kind is Kind.MODEL:
        return TrainableModel(target, recipe)
    answers = [text.ids[text.num_prompt :] for text in texts]
    learned, proposed = (
        most_frequent(answers, min(count, target.vocabulary), target.vocabulary)
        for count in (recipe.vocabulary, min(recipe.proposed, recipe.vocabulary))
    )
    return TrainableHead(target, recipe, learned, proposed)


class TrainableHead:
    """A head, learning."""

    def __init__(self, target: Target, recipe: Recipe, tokens: Tensor, proposed: Tensor) -> None:
        """Start from random layers; learn to tell `tokens` apart, and propose those that are `proposed`."""
        self._target, self._tokens = target, proposed
        torch.manual_seed(recipe.seed)
        config = target.model.config.get_text_config()
        self.network = HeadNetwork(HeadShape.of(config, recipe.layers, len(proposed)))
        output = target.output[tokens.to(target.device)]
        weights = (target.embedding.float(), output.float(), tokens)
        self.student = HeadLoss(self.network, *weights, recipe.unroll, recipe.unroll_decay)

    def drafter(self, hidden: HiddenStates) -> Drafter:
        """Return a drafter with a copy of the weights, in the target's numbers."""
        network = HeadNetwork(self.network.shape)
        network.load_state_dict({key: weight.detach().cpu() for key, weight in self.network.state_dict().items()})
        tokens = self._tokens.to(self._target.device)
        head = PackedHead(
            network, self._target.embedding, self._target.output[tokens], tokens, slots=1, capacity=hidden.capacity
        )
        return HeadDrafter(head, hidden, "head")

    def write(self, folder: Path) -> list[Path]:
        """Write the head."""
        return write_head(folder, self.network, self._tokens, self._target.identity)


class TrainableModel:
    """A small language model of the target's shape, learning; it starts from the target's first layers."""

    def __init__(self, target: Target, recipe: Recipe) -> None:
        """Load the first layers of the target again, in float32."""
        self._target, self._layers = target, recipe.layers
        self.network: PreTrainedModel = self._load(torch.float32, "sdpa")
        words = (self.network.get_input_embeddings(), self.network.get_output_embeddings())  # type: ignore[no-untyped-call]
        for module in words:
            module.requires_grad_(False)  # the target's own, and many
        self.student = ModelLoss(self.network)

    def drafter(self, hidden: HiddenStates) -> Drafter:
        """Return a drafter with a copy of the weights, in the target's numbers."""
        model = self._load(self._target.model.dtype, ATTENTION_NAME)
        model.load_state_dict(self.network.state_dict())
        fuse_layers(model)
        packed = PackedModel(model, slots=1, capacity=hidden.capacity)
        return ModelDrafter(packed, "model", self._target.vocabulary)

    def write(self, folder: Path) -> list[Path]:
        """Write a directory that transformers loads, with the target's tokenizer."""
        self.network.bfloat16().save_pretrained(folder)
        self._target.tokenizer.save_pretrained(folder)
        return sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))

    def _load(self, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            self._target.path,
            num_hidden_layers=self._layers,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
        assert isinstance(model, PreTrainedModel)
        model.to(self._target.device)  # type: ignore[arg-type]  # as in loading.load
        return model
