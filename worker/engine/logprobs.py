"""Log-probabilities of emitted and prompt tokens and of the most likely alternatives, for sequences that request them.

A log-probability is the log-softmax of the target's raw logits at the row before the token: before temperature,
penalties, bias and filters, so it does not depend on sampling. Each row is computed alone in double precision: batch
and tree change it only by the rounding of the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from worker.engine.batch import Chunk
from worker.engine.sampling.sampling import log_totals
from worker.engine.segments import IntArray, ranges
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.verifier import AcceptedPaths
from worker.engine.token_logprobs import Logprobs, TokenLogprobs

_ROWS_AT_ONCE = 32  # bounds the memory of rows in double precision
MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON can't encode


def compute_logprobs(
    forest: Forest, logits: Tensor, rows: IntArray, accepted: AcceptedPaths, emitted: IntArray
) -> dict[int, Logprobs]:
    """Return the log-probabilities of the first `emitted` [trees] drawn tokens of each tree that requests them.

    `rows[node]` is the node's row in `logits` [rows, vocab]. A token is drawn at the row of its parent node.
    """
    requested = forest.columns.with_logprobs.tolist()
    if not requested:
        return {}
    lengths = emitted[requested]
    drawn = ranges(accepted.firsts[requested], lengths)
    tokens = accepted.drawn[drawn].tolist()
    counts = np.repeat([forest.sequences[tree].sampling.logprobs or 0 for tree in requested], lengths).tolist()
    indices = torch.from_numpy(rows[accepted.visited[drawn]]).to(logits.device)
    read: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        read += read_rows(logits[indices[some]], tokens[some], counts[some])
    ends = lengths.cumsum().tolist()
    return {
        tree: tuple(read[end - length : end])
        for tree, length, end in zip(requested, lengths.tolist(), ends, strict=True)
    }


def score_prompts(chunks: Sequence[Chunk], logits: Tensor, rows: IntArray) -> None:
    """Append the log-probabilities of prompt tokens to their sequences.

    `rows` are those in `logits` [rows, vocab] of the scored positions of the chunks, in their order. The token after a
    position is scored.
    """
    start = 0
    for chunk in chunks:
        sequence, scored = chunk.sequence, chunk.scored
        own = rows[start : start + len(scored)]
        start += len(scored)
        for first in range(0, len(scored), _ROWS_AT_ONCE):
            positions = scored[first : first + _ROWS_AT_ONCE]
            some = logits[torch.from_numpy(own[first : first + _ROWS_AT_ONCE]).to(logits.device)]
            tokens = sequence.ids[positions.start + 1 : positions.stop + 1]
            read = read_rows(some, tokens, [sequence.prompt_top or 0] * len(tokens))
            ranks = _ranks(some, tokens)
            sequence.prompt_logprobs += [replace(one, rank=rank) for one, rank in zip(read, ranks, strict=True)]


def _ranks(logits: Tensor, tokens: Sequence[int]) -> list[int]:
    """Return how many tokens of each row are at least as likely as its own."""
    own = logits.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1))
    ranks: list[int] = (logits >= own).sum(-1).tolist()
    return ranks


def read_rows(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Return for each row of `logits` [rows, vocab] the logprobs of its token and of its `counts[row]` top ones."""
    totals = log_totals(logits)
    drawn = logits.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1)).squeeze(-1)
    drawn_logprobs = _rounded(drawn, totals)
    max_count = min(max(counts, default=0), logits.shape[-1])
    tops = _top_tokens(logits, totals, max_count) if max_count else [()] * len(tokens)
    return [
        TokenLogprobs(logprob, top[:count]) for logprob, top, count in zip(drawn_logprobs, tops, counts, strict=True)
    ]


def _top_tokens(logits: Tensor, totals: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Return the `count` most likely tokens of each row.

    `topk` picks any of several equal tokens, so all that reach its lowest score are read and ties are sorted by id.
    """
    min_scores = logits.topk(count, dim=-1).values[:, -1:]
    row, token = (logits >= min_scores).nonzero(as_tuple=True)  # by row, then by token
    scores = logits[row, token]
    entries = zip(row.tolist(), scores.tolist(), token.tolist(), _rounded(scores, totals[row]), strict=True)
    found: list[list[tuple[float, int, float]]] = [[] for _ in range(len(logits))]
    for index, score, other, logprob in entries:
        found[index].append((-score, other, logprob))
    return [tuple((other, logprob) for _, other, logprob in sorted(some)[:count]) for some in found]


def _rounded(logits: Tensor, totals: Tensor) -> list[float]:
    """Return log-probabilities in single precision, which hides differences in the order of summation."""
    values: list[float] = (
        (logits.double() - totals).float().nan_to_num(nan=MIN_LOGPROB).clamp(MIN_LOGPROB, 0.0).tolist()
    )
    return values
