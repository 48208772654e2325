"""The kinds of draft that can be trained: their loss module, a drafter with the current weights, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from worker.drafters.block import head_drafter, pack_head
from worker.drafters.block_network import BlockNetwork, BlockShape
from worker.drafters.head_file import read_head, write_head
from worker.drafters.head_network import HeadNetwork, HeadShape
from worker.drafters.model import ModelDrafter
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.speculation.drafting import Drafter
from worker.training.block_loss import BlockLoss
from worker.training.config import Kind, Recipe
from worker.training.losses import HeadLoss, ModelLoss, TrainingVocabulary, most_frequent
from worker.training.self_generated import Text
from worker.training.target import Target


class TrainableDraft(Protocol):
    """The interface of a draft in training."""

    @property
    def loss(self) -> nn.Module:
        """Module that returns the LossOutput of a batch."""

    @property
    def network(self) -> nn.Module:
        """The part of `loss` whose weights are the draft."""

    def drafter(self, hidden: HiddenStates) -> Drafter:
        """Return a drafter with a copy of the current weights."""

    def save(self, folder: Path) -> list[Path]:
        """Save the draft; return its files."""


def trainable_draft(target: Target, recipe: Recipe, texts: Sequence[Text]) -> TrainableDraft:
    """Return an untrained draft; a head's vocabulary is the most frequent tokens in the answers of `texts`.

    One that starts from another head has that one's vocabulary.
    """
    if recipe.kind is Kind.MODEL:
        return TrainableModel(target, recipe)
    if recipe.kind is Kind.BLOCK and recipe.start:
        tokens = read_head(recipe.start, target.identity).tokens
        return TrainableBlock(target, recipe, tokens, tokens)
    answers = [text.ids[text.num_prompt :] for text in texts]
    learned, proposed = (
        most_frequent(answers, min(count, target.vocabulary), target.vocabulary)
        for count in (recipe.vocabulary, min(recipe.proposed, recipe.vocabulary))
    )
    kind = TrainableBlock if recipe.kind is Kind.BLOCK else TrainableHead
    return kind(target, recipe, learned, proposed)


class TrainableHead:
    """A head in training: its network, and the target's weights that it reads."""

    name = "head"

    def __init__(self, target: Target, recipe: Recipe, tokens: Tensor, proposed: Tensor) -> None:
        """Initialise random layers; train on the vocabulary `tokens`, propose only the ids in `proposed`."""
        self._target, self._proposed, self._recipe = target, proposed, recipe
        torch.manual_seed(recipe.seed)
        self.network = self._network(target.model.config.get_text_config())
        output = target.output[tokens.to(target.device)]
        self.loss = self._loss(TrainingVocabulary(target.embedding.float(), output.float(), tokens))

    def _network(self, config: PreTrainedConfig) -> HeadNetwork:
        return HeadNetwork(HeadShape.of(config, self._recipe.layers, len(self._proposed)))

    def _loss(self, vocabulary: TrainingVocabulary) -> nn.Module:
        return HeadLoss(self.network, vocabulary, self._recipe.unroll, self._recipe.unroll_decay)

    def drafter(self, hidden: HiddenStates) -> Drafter:
        """Return a drafter with a copy of the current weights in the target's dtype."""
        network, target = deepcopy(self.network).cpu(), self._target
        tokens = self._proposed.to(target.device)
        given = (target.embedding, target.output[tokens], tokens)
        return head_drafter(pack_head(network, *given, slots=1, capacity=hidden.capacity), hidden, self.name)

    def save(self, folder: Path) -> list[Path]:
        """Write the head in the format of `worker.drafters.head_file`."""
        return write_head(folder, self.network, self._proposed, self._target.identity)


class TrainableBlock(TrainableHead):
    """A block drafter in training. It can start with the weights of a head, which foresees the first depth already."""

    name = "block"
    network: BlockNetwork

    def _network(self, config: PreTrainedConfig) -> BlockNetwork:
        recipe = self._recipe
        shape = replace(BlockShape.of(config, recipe.layers, len(self._proposed)), depth=recipe.depth, rank=recipe.rank)
        network = BlockNetwork(shape)
        if recipe.start:
            network.start_from(read_head(recipe.start, self._target.identity).network)
        return network

    def _loss(self, vocabulary: TrainingVocabulary) -> nn.Module:
        return BlockLoss(self.network, vocabulary, self._recipe.roots)


class TrainableModel:
    """A small language model in training; it starts as the target's first layers."""

    def __init__(self, target: Target, recipe: Recipe) -> None:
        """Load the target's first layers in float32."""
        self._target, self._layers = target, recipe.layers
        self.network: PreTrainedModel = self._load(torch.float32, "sdpa")
        embeddings = (self.network.get_input_embeddings(), self.network.get_output_embeddings())  # type: ignore[no-untyped-call]
        for module in embeddings:
            module.requires_grad_(False)  # large, and already the target's
        self.loss = ModelLoss(self.network)

    def drafter(self, hidden: HiddenStates) -> Drafter:
        """Return a drafter with a copy of the current weights in the target's dtype."""
        model = self._load(self._target.model.dtype, ATTENTION_NAME)
        model.load_state_dict(self.network.state_dict())
        fuse_layers(model)
        packed = PackedModel(model, slots=1, capacity=hidden.capacity)
        return ModelDrafter(packed, "model", self._target.vocabulary)

    def save(self, folder: Path) -> list[Path]:
        """Save a directory that transformers loads, with the target's tokenizer."""
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
