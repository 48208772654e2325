"""The target of a training, loaded before its layers are fused, with the weights that it shares with a draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from jobs.messages import model_name
from worker.drafters.head_file import TargetIdentity, target_identity
from worker.engine.model.backend import fuse_layers
from worker.engine.model.loading import embeddings, load, native_dtype, output_weights
from worker.engine.model.packed_model import PackedModel
from worker.loading.model_store import resolve
from worker.settings import WorkerSettings
from worker.text.codec import load_tokenizer


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target whose layers are not fused, with its tokenizer and the weights that a draft shares."""

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    identity: TargetIdentity
    embedding: Tensor  # [vocab, width]
    output: Tensor  # [vocab, width]

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the tokenizer and the model both have."""
        return min(len(self.tokenizer), self.identity.vocabulary)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    def packed(self, taps: Sequence[int], capacity: int) -> PackedModel:
        """Return the target with fused layers, one KV slot of `capacity` entries and tapped layers. Call it once."""
        fuse_layers(self.model)
        return PackedModel(self.model, slots=1, capacity=capacity, defined_ids=self.vocabulary, tapped=taps)


def load_target(settings: WorkerSettings) -> Target:
    """Load the target of the settings without fusing its layers; raises ModelRefused or SetupError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = native_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    path = resolve(settings.target, settings.cache_dir, base=settings.base_model)
    model, tokenizer = load(path, dtype=dtype, device=device), load_tokenizer(path)
    identity = target_identity(model, model_name(settings.target), tokenizer.get_vocab())
    return Target(path, model, tokenizer, identity, embeddings(model), output_weights(model).clone())
