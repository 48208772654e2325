"""Train a head on texts of its target: what was accepted and refused is what the target wrote after each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from worker.drafters.head_network import HeadNetwork
from worker.drafters.head_unroll import unroll
from worker.learning.shared_memory import LearningText

OUTPUT, TOKENS = "output", "tokens"  # names of the tensors that training reads beside those of the network
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class LearningRecipe:
    """Hyperparameters of learning while jobs run."""

    learning_rate: float = 3e-4
    texts: int = 4  # of an update
    visits: float = 2.0  # of each text, on average: without new texts the trainer then waits
    unroll: int = 2  # depths that the head is trained to predict
    compared_depths: int = 3  # of the chains of drafts by which weights are compared
    unroll_decay: float = 0.8  # loss weight of a depth relative to the one before
    held_out_every: int = 8  # each eighth text serves to compare weights, and never to train them
    held_out: int = 8  # texts of a comparison, the latest
    min_held_out: int = 3
    latest: int = 128  # texts that updates draw from
    updates: int = 16  # between two comparisons
    patience: int = 4  # comparisons in a row that training may lose before it returns to the served weights
    min_gain: float = 0.005  # relative, of the accepted tokens: weights that gain less are not worth a swap


class HeadTrainer:
    """A head in training, in float32."""

    def __init__(self, network: HeadNetwork, output: Tensor, tokens: Tensor, recipe: LearningRecipe) -> None:
        """Take a network, which is changed, and the `output` weights [n, width] of the ids `tokens` [n], ascending."""
        self.network = network.float()
        self._output, self._tokens, self._recipe = output, tokens, recipe
        self._weights = [weight for weight in network.parameters() if weight.requires_grad]
        self._optimizer = self._fresh_optimizer()

    def update(self, texts: Sequence[LearningText]) -> float:
        """Run one optimizer step and return the loss."""
        losses: list[Tensor] = []
        for logits, rows, _ in self._unrolled(self.network, texts, self._recipe.unroll):
            known = rows >= 0
            loss = nn.functional.cross_entropy(logits[known], rows[known], reduction="sum") / max(len(rows), 1)
            losses.append(self._recipe.unroll_decay ** len(losses) * loss)
        total = torch.stack(losses).sum()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, _MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(total.detach())

    @torch.inference_mode()
    def accepted(self, network: HeadNetwork, texts: Sequence[LearningText]) -> float:
        """Return the mean number of tokens that a chain of drafts gets right: at most `compared_depths`."""
        right, hits = None, 0.0
        for logits, rows, mask in self._unrolled(network, texts, self._recipe.compared_depths):
            hit = torch.zeros_like(mask)
            hit[mask] = logits.argmax(-1) == rows
            right = hit if right is None else right & hit
            hits += float(right.sum())
        return hits / max(sum(len(text.ids) - text.num_prompt for text in texts), 1)

    def restart(self, network: HeadNetwork) -> None:
        """Continue from the weights of another network of the same shape."""
        self.network.load_state_dict(network.state_dict())
        self._optimizer = self._fresh_optimizer()

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._weights, lr=self._recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)

    def _unrolled(
        self, network: HeadNetwork, texts: Sequence[LearningText], depths: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for each depth: logits [rows, n], indices [rows] of the right tokens in `tokens` (-1: none), a mask.

        The mask [texts, length] has the rows: those whose token at distance depth + 1 was written by the target.
        """
        ids, states, embedded = (
            pad_sequence([getattr(text, name) for text in texts], batch_first=True)
            for name in ("ids", "states", "embedded")
        )
        first = torch.tensor([text.num_prompt - 1 for text in texts])[:, None]
        length = torch.tensor([len(text.ids) for text in texts])[:, None]
        positions = torch.arange(ids.shape[1])
        # Where the target computes in bfloat16, so does this: twice as fast. The weights stay in float32.
        with torch.autocast("cpu", torch.bfloat16, enabled=states.dtype is torch.bfloat16):
            for depth, out in enumerate(unroll(network, embedded.float(), states.float(), depths)):
                mask = (positions >= first) & (positions + depth + 1 < length)
                following = ids.roll(-depth - 1, 1)[mask]
                rows = torch.searchsorted(self._tokens, following).clamp(max=len(self._tokens) - 1)
                rows = torch.where(self._tokens[rows] == following, rows, -1)
                yield (out[mask] @ self._output.T).float(), rows, mask
