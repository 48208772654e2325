"""Token counts of a sequence, and the penalties and biases that they bring to the logits of its next token."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from worker.engine.sampling.sampling import Sampling
from worker.engine.segments import IntArray


class TokenCounts:
    """The distinct tokens of one sequence, and how often each occurs in its output. Updated incrementally."""

    def __init__(self) -> None:
        self._num_counted = 0
        self._index: dict[int, int] = {}
        self._tokens = array("q")
        self._counts = array("q")

    def update(self, ids: list[int], num_prompt: int) -> None:
        """Count the tokens of `ids` beyond those that were counted before."""
        for i in range(self._num_counted, len(ids)):
            self._add(ids[i], int(i >= num_prompt))
        self._num_counted = len(ids)

    def with_path(self, path: Seq[int]) -> tuple[IntArray, IntArray]:
        """Return the distinct tokens of the sequence followed by `path`, and how often each occurs in the output."""
        new = list(dict.fromkeys(token for token in path if token not in self._index))
        tokens = np.array([*new, *self._tokens] if new else self._tokens, np.int64)
        counts = np.array([*[0] * len(new), *self._counts] if new else self._counts, np.int64)
        for token in path:
            index = self._index.get(token)
            counts[new.index(token) if index is None else len(new) + index] += 1
        return tokens, counts

    def _add(self, token: int, count: int) -> None:
        index = self._index.setdefault(token, len(self._tokens))
        if index == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        self._counts[index] += count


def apply_penalties(logits: Tensor, samplings: Seq[Sampling], seen: Seq[tuple[IntArray, IntArray]]) -> Tensor:
    """Apply logit_bias, then the repetition, frequency and presence penalties, to a copy of `logits` [rows, vocab].

    `seen` holds each row's `TokenCounts.with_path`. Repetition is transformers' (prompt and output; divides or
    multiplies); frequency and presence are OpenAI's (output, subtract).
    """
    scores = logits.float().clone()
    _add_bias(scores, samplings)
    rows = _flat([np.full(len(tokens), row) for row, (tokens, _) in enumerate(seen)], logits)
    tokens, counts = _flat([t for t, _ in seen], logits), _flat([c for _, c in seen], logits)
    repetition, frequency, presence = (
        torch.tensor(values, dtype=torch.float32, device=logits.device)[rows]
        for values in (
            [s.repetition_penalty for s in samplings],
            [s.frequency_penalty for s in samplings],
            [s.presence_penalty for s in samplings],
        )
    )
    old = scores[rows, tokens]
    repeated = torch.where(old < 0, old * repetition, old / repetition)
    scores[rows, tokens] = repeated - frequency * counts - presence * (counts > 0)
    return scores


def _add_bias(scores: Tensor, samplings: Seq[Sampling]) -> None:
    biased = [(row, token, bias) for row, s in enumerate(samplings) for token, bias in s.logit_bias]
    if biased:
        rows, tokens, values = zip(*biased, strict=True)
        at = (torch.tensor(rows, device=scores.device), torch.tensor(tokens, device=scores.device))
        scores[at] += torch.tensor(values, dtype=torch.float32, device=scores.device)


def _flat(parts: Seq[IntArray], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(like.device)
