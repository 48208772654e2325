"""Students: the networks that are trained, and what each is told it got wrong.

A loss is the cross-entropy against the target's own law at each token, so that a draft learns what the target might
have said too, not only what it said.
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
from worker.training.features import Example
from worker.training.head_unroll import unroll


@dataclass(frozen=True, slots=True)
class Batch:
    """Some lessons side by side, padded at their ends."""

    ids: Tensor  # [texts, n]
    hidden: Tensor  # [texts, n, taps * width]
    next_ids: Tensor  # [texts, n, k]
    next_probabilities: Tensor  # [texts, n, k]; 0 in the padding
    first: Tensor  # [texts] the row that foresees the first token of the answer
    length: Tensor  # [texts]

    @classmethod
    def of(cls, lessons: Sequence[Example]) -> Batch:
        """Put lessons side by side."""
        padded = {
            name: pad_sequence([getattr(example, name) for example in lessons], batch_first=True)
            for name in ("ids", "hidden", "next_ids", "next_probabilities")
        }
        first = torch.tensor([example.num_prompt - 1 for example in lessons])
        return cls(**padded, first=first, length=torch.tensor([len(example.ids) for example in lessons]))

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def rows(self, ahead: int) -> Tensor:
        """Return [texts, n]: rows of the answer identity text goes on so many tokens behind the next one."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (places >= self.first[:, None]) & (places + ahead + 1 < self.length[:, None])


@dataclass(frozen=True, slots=True)
class LossOutput:
    """How a student did on a batch."""

    loss: Tensor  # to be made smaller
    right: tuple[float, ...]  # share of tokens foreseen at first rank, by depth


class HeadLoss(nn.Module):
    """A head, learning."""

    def __init__(
        self, network: HeadNetwork, embedding: Tensor, output: Tensor, ids: Tensor, steps: int, decay: float
    ) -> None:
        """Take the target's `embedding` [vocab, width] and `output` rows [vocabulary, width] of the tokens `ids`."""
        super().__init__()
        self.network = network
        self._steps, self._weights = steps, [decay**step for step in range(steps)]
        places = torch.full((len(embedding),), -1)
        places[ids] = torch.arange(len(ids))
        self.embedding, self.output, self.places = (
            nn.Buffer(fixed, persistent=False) for fixed in (embedding, output, places)
        )

    def forward(self, batch: Batch) -> LossOutput:
        """Return the output of a batch."""
        embedded = nn.functional.embedding(batch.ids, self.embedding)
        losses, right = [], []
        for step, states in enumerate(unroll(self.network, embedded, batch.hidden, self._steps)):
            here = batch.rows(step)
            loss, hit = self._marked(
                states[here], *(t.roll(-step, 1)[here] for t in (batch.next_ids, batch.next_probabilities))
            )
            losses.append(self._weights[step] * loss)
            right.append(hit)
        return LossOutput(torch.stack(losses).sum() / sum(self._weights), tuple(right))

    def _marked(self, states: Tensor, next_ids: Tensor, probabilities: Tensor) -> tuple[Tensor, float]:
        places = self.places[next_ids]
        logits = nn.functional.linear(states, self.output)
        return _marked(logits, places.clamp(min=0), probabilities * (places >= 0))


class ModelLoss(nn.Module):
    """A language model, learning. It reads nothing but the text, so there is nothing of its own to get used to."""

    def __init__(self, network: PreTrainedModel) -> None:
        """Take a model that can be trained."""
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> LossOutput:
        """Return the output of a batch."""
        here = batch.rows(0)
        logits = self.network(input_ids=batch.ids, use_cache=False).logits[here]
        loss, hit = _marked(logits, batch.next_ids[here], batch.next_probabilities[here])
        return LossOutput(loss, (hit,))


def _marked(logits: Tensor, next_ids: Tensor, probabilities: Tensor) -> tuple[Tensor, float]:
    """Return the cross-entropy against the likeliest next tokens [rows, k], and the share of the likeliest foreseen."""
    wrong = logits.float().log_softmax(-1).gather(1, next_ids)
    hit = (logits.detach().argmax(-1) == next_ids[:, 0]) & (probabilities[:, 0] > 0)
    return -(probabilities * wrong).sum(-1).mean(), float(hit.float().mean())


def most_frequent(texts: Iterable[Sequence[int]], count: int, vocabulary: int) -> Tensor:
    """Return the `count` ids that are written most often, ascending; the lowest ids where too few were written."""
    counted = Counter(token for text in texts for token in text)
    chosen = [token for token, _ in counted.most_common(count)]
    others = (token for token in range(vocabulary) if token not in counted)
    chosen += [token for token, _ in zip(others, range(count - len(chosen)), strict=False)]
    return torch.tensor(sorted(chosen))
