"""Training modules and their losses: cross-entropy between the draft and the target's next-token distribution.

Distilling the distribution teaches the draft what the target might have written, not only what it wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from worker.drafters.head_network import HeadNetwork
from worker.drafters.head_unroll import unroll
from worker.training.features import Example


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Examples padded at their ends to one length."""

    ids: Tensor  # [texts, n]
    hidden: Tensor  # [texts, n, taps * width]
    next_ids: Tensor  # [texts, n, k]
    next_probabilities: Tensor  # [texts, n, k]; 0 in the padding
    first: Tensor  # [texts] row that predicts the first token of the answer
    length: Tensor  # [texts] tokens without padding

    @classmethod
    def collate(cls, examples: Sequence[Example]) -> TrainingBatch:
        """Pad and stack examples."""
        padded = {
            name: pad_sequence([getattr(example, name) for example in examples], batch_first=True)
            for name in ("ids", "hidden", "next_ids", "next_probabilities")
        }
        first = torch.tensor([example.num_prompt - 1 for example in examples])
        return cls(**padded, first=first, length=torch.tensor([len(example.ids) for example in examples]))

    def to(self, device: torch.device) -> TrainingBatch:
        """Return the batch on a device."""
        return TrainingBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def loss_mask(self, step: int) -> Tensor:
        """Return [texts, n]: the rows whose token at distance `step + 1` belongs to the answer."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (positions >= self.first[:, None]) & (positions + step + 1 < self.length[:, None])


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss and accuracy of a batch."""

    loss: Tensor  # scalar
    accuracy: tuple[float, ...]  # share of tokens whose argmax is the target's, by depth


class TrainingVocabulary(nn.Module):
    """The target's weights that a draft on its hidden states shares: they are not trained."""

    def __init__(self, embedding: Tensor, output: Tensor, ids: Tensor) -> None:
        """Take the target's `embedding` [vocab, width] and `output` rows [training vocabulary, width] of `ids`."""
        super().__init__()
        row_of_id = torch.full((len(embedding),), -1)  # -1: not in the training vocabulary
        row_of_id[ids] = torch.arange(len(ids))
        self.embedding, self.output, self.row_of_id = (
            nn.Buffer(fixed, persistent=False) for fixed in (embedding, output, row_of_id)
        )

    def embedded(self, ids: Tensor) -> Tensor:
        """Return the embeddings [..., width] of ids."""
        return nn.functional.embedding(ids, self.embedding)

    def rows(self, ids: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output row of each id, and its probability; that of an id without a row is 0."""
        rows = self.row_of_id[ids]
        return rows.clamp(min=0), probabilities * (rows >= 0)


class HeadLoss(nn.Module):
    """A head and its loss over all unroll steps."""

    def __init__(self, network: HeadNetwork, vocabulary: TrainingVocabulary, steps: int, decay: float) -> None:
        """Unroll `network` this many steps; each counts `decay` times as much as the one before."""
        super().__init__()
        self.network = network
        self.vocabulary = vocabulary
        self._steps, self._weights = steps, [decay**step for step in range(steps)]

    def forward(self, batch: TrainingBatch) -> LossOutput:
        """Return the mean loss over the unroll steps, weighted by decay, and the accuracy of each step."""
        embedded = self.vocabulary.embedded(batch.ids)
        losses, accuracy = [], []
        for step, states in enumerate(unroll(self.network, embedded, batch.hidden, self._steps)):
            mask = batch.loss_mask(step)
            loss, step_accuracy = self._loss(
                states[mask], *(t.roll(-step, 1)[mask] for t in (batch.next_ids, batch.next_probabilities))
            )
            losses.append(self._weights[step] * loss)
            accuracy.append(step_accuracy)
        return LossOutput(torch.stack(losses).sum() / sum(self._weights), tuple(accuracy))

    def _loss(self, states: Tensor, next_ids: Tensor, probabilities: Tensor) -> tuple[Tensor, float]:
        logits = nn.functional.linear(states, self.vocabulary.output)
        return _cross_entropy(logits, *self.vocabulary.rows(next_ids, probabilities))


class ModelLoss(nn.Module):
    """A language model and its loss. It reads tokens only, never its own states, so it needs no unroll steps."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: TrainingBatch) -> LossOutput:
        """Return the loss and accuracy of a batch."""
        mask = batch.loss_mask(0)
        logits = self.network(input_ids=batch.ids, use_cache=False).logits[mask]
        loss, accuracy = _cross_entropy(logits, batch.next_ids[mask], batch.next_probabilities[mask])
        return LossOutput(loss, (accuracy,))


def _cross_entropy(logits: Tensor, next_ids: Tensor, probabilities: Tensor) -> tuple[Tensor, float]:
    """Return the cross-entropy against the target's top-k next tokens [rows, k], and the top-1 accuracy."""
    log_probabilities = logits.float().log_softmax(-1).gather(1, next_ids)
    hit = (logits.detach().argmax(-1) == next_ids[:, 0]) & (probabilities[:, 0] > 0)
    return -(probabilities * log_probabilities).sum(-1).mean(), float(hit.float().mean())


def most_frequent(texts: Iterable[Sequence[int]], count: int, vocabulary: int) -> Tensor:
    """Return the `count` most frequent ids, ascending; if fewer occur, add the lowest ids that don't."""
    counted = Counter(token for text in texts for token in text)
    chosen = [token for token, _ in counted.most_common(count)]
    others = (token for token in range(vocabulary) if token not in counted)
    chosen += [token for token, _ in zip(others, range(count - len(chosen)), strict=False)]
    return torch.tensor(sorted(chosen))
