"""Log-probabilities of emitted tokens, and of the likeliest tokens in their places, for sequences that want them.

The law is the target's own: log-softmax of the raw logits of the row at which the token was drawn, before temperature,
penalties, bias and filters. So they say how likely the model finds its text, and do not depend on how it was sampled. A
row is read by itself, in double precision: of batch and tree nothing is in it but what the forward rounds differently
when it has more rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.engine.segments import IntArray
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.verifier import AcceptedPath

_ROWS_AT_ONCE = 32  # rows in double precision take memory
LEAST = -9999.0  # what is impossible has this one: JSON knows no infinity


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the target found one emitted token, and the likeliest tokens in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), likeliest first; equals by token


Logprobs = tuple[TokenLogprobs, ...] | None  # of the tokens of one sequence in one step; None: it wants to know none


def compute_logprobs(
    forest: Forest, logits: Tensor, rows: IntArray, accepted: Sequence[AcceptedPath], kept: Sequence[list[int]]
) -> list[Logprobs]:
    """Return for each tree what is told of its kept tokens.

    `rows[node]` is the row of `logits` [rows, vocab] that shows the node. A token is drawn at the node before it.
    """
    wanting = [tree for tree, sequence in enumerate(forest.sequences) if sequence.sampling.logprobs is not None]
    told: list[Logprobs] = [None] * len(forest.sequences)
    if not wanting:
        return told
    places = [rows[[tree, *accepted[tree].path]][: len(kept[tree])] for tree in wanting]
    tokens = [token for tree in wanting for token in kept[tree]]
    counts = [forest.sequences[tree].sampling.logprobs or 0 for tree in wanting for _ in kept[tree]]
    shown = torch.from_numpy(np.concatenate(places)).to(logits.device)
    read: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        read += read_rows(logits[shown[some]], tokens[some], counts[some])
    ends = np.cumsum([len(kept[tree]) for tree in wanting])
    for tree, end in zip(wanting, ends.tolist(), strict=True):
        told[tree] = tuple(read[end - len(kept[tree]) : end])
    return told


def read_rows(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Return for each row of `logits` [rows, vocab] the logprob of its token, and of its `counts[row]` likeliest."""
    totals = logits.double().logsumexp(-1)
    drawn = logits.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1)).squeeze(-1)
    drawn_logprobs = _rounded(drawn, totals)
    most = min(max(counts, default=0), logits.shape[-1])
    tops = _likeliest(logits, totals, most) if most else [()] * len(tokens)
    return [
        TokenLogprobs(logprob, top[:count]) for logprob, top, count in zip(drawn_logprobs, tops, counts, strict=True)
    ]


def _likeliest(logits: Tensor, totals: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Return the `count` likeliest tokens of each row. Which of equal ones `topk` takes is open, so all are read."""
    floors = logits.topk(count, dim=-1).values[:, -1:]
    row, token = (logits >= floors).nonzero(as_tuple=True)  # by row, then by token
    scores = logits[row, token]
    entries = zip(row.tolist(), scores.tolist(), token.tolist(), _rounded(scores, totals[row]), strict=True)
    found: list[list[tuple[float, int, float]]] = [[] for _ in range(len(logits))]
    for place, score, other, logprob in entries:
        found[place].append((-score, other, logprob))
    return [tuple((other, logprob) for _, other, logprob in sorted(some)[:count]) for some in found]


def _rounded(logits: Tensor, totals: Tensor) -> list[float]:
    """Return log-probabilities in single precision, in which the order of a sum no longer shows."""
    values: list[float] = (logits.double() - totals).float().nan_to_num(nan=LEAST).clamp(LEAST, 0.0).tolist()
    return values
