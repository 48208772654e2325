"""Draws with torch's operations, for devices without compiled ones. They define what the compiled ones compute.

Every operation is elementwise, an order-free choice (maximum, sorted values) or a sum of integers, so that a row's draw
depends neither on the shape of the batch nor on the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from worker.engine.sampling.parameters import GOLDEN, MIX_1, MIX_2, Adjustments, ParameterArray
from worker.engine.segments import IntArray

_NUCLEUS = 256  # most likely tokens that are searched first for the end of the top_p nucleus
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def draw(logits: Tensor, parameters: ParameterArray, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the tokens int64 [rows] drawn from adjusted float32 `logits` [rows, vocab]; `keys` are [rows, 1]."""
    if mask is not None:
        kept = allowed(mask, logits.shape[-1])
        logits = logits.masked_fill(~kept & ~logits.isnan(), -torch.inf)
    drawn = first_argmax(logits)
    sampled = np.flatnonzero(parameters["temperature"] != 0)
    if len(sampled):
        rows = torch.from_numpy(sampled).to(logits.device)
        scores = process(logits[rows], parameters[sampled])
        noise = gumbel(keys[rows], torch.arange(logits.shape[-1], device=logits.device))
        drawn[rows] = first_argmax(noise.add_(scores))
    if mask is not None:  # where all allowed logits are -inf, the first one is drawn
        lost = ~kept.gather(-1, drawn.clamp(min=0).unsqueeze(-1)).squeeze(-1) & (drawn >= 0)
        drawn = torch.where(lost, torch.where(kept.any(-1), kept.int().argmax(-1), -1), drawn)
    return drawn


def first_argmax(scores: Tensor) -> Tensor:
    """Return the index of the highest score of each row; -1 if one is NaN, which `Tensor.argmax` returns first."""
    indices = scores.argmax(-1)
    return indices.masked_fill_(scores.gather(-1, indices.unsqueeze(-1)).squeeze(-1).isnan(), -1)


def adjust(logits: Tensor, parameters: ParameterArray, adjustments: Adjustments) -> Tensor:
    """Return `logits` [rows, vocab] under bias, then repetition, frequency and presence penalties, as float32."""
    scores = logits.float().clone()
    at = _places(adjustments.bias_starts, adjustments.bias_tokens, scores)
    scores[at] += torch.from_numpy(adjustments.biases).to(scores.device)
    at = rows, _ = _places(adjustments.seen_starts, adjustments.seen_tokens, scores)
    counts = torch.from_numpy(adjustments.seen_counts).to(scores.device)
    repetition, frequency, presence = (
        column(parameters, f"{name}_penalty", scores).squeeze(-1)[rows]
        for name in ("repetition", "frequency", "presence")
    )
    old = scores[at]
    repeated = torch.where(old < 0, old * repetition, old / repetition)
    scores[at] = repeated - frequency * counts - presence * (counts > 0)
    return scores


def _places(starts: IntArray, tokens: IntArray, like: Tensor) -> tuple[Tensor, Tensor]:
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return torch.from_numpy(rows).to(like.device), torch.from_numpy(tokens).to(like.device)


def allowed(mask: Tensor, vocab: int) -> Tensor:
    """Return the bits of `mask` int32 [rows, words] as booleans [rows, vocab]."""
    bits = mask.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=mask.device)
    return (bits & 1).bool().flatten(1)[:, :vocab]


def process(logits: Tensor, parameters: ParameterArray) -> Tensor:
    """Apply temperature, top_k, top_p and min_p to `logits` [rows, vocab], in that order (as transformers does)."""
    scores = apply_temperature(logits, parameters)
    return scores.masked_fill_(scores < _min_scores(scores, parameters), -torch.inf)


def apply_temperature(logits: Tensor, parameters: ParameterArray) -> Tensor:
    """Return `logits` [rows, vocab] divided by their temperatures, float32."""
    return logits.float() / column(parameters, "temperature", logits)


def _min_scores(scores: Tensor, parameters: ParameterArray) -> Tensor:
    """Return the lowest score [rows, 1] that the filters keep; all tokens of an equal score are kept."""
    lowest = scores.new_full((len(scores), 1), -torch.inf)
    if parameters["top_k"].any():
        lowest = _top_k_min_score(scores, torch.from_numpy(parameters["top_k"]).to(scores.device).unsqueeze(1).long())
    nuclear = np.flatnonzero(parameters["top_p"] < 1.0)
    if len(nuclear):
        rows = torch.from_numpy(nuclear).to(scores.device)
        kept = scores[rows].masked_fill(scores[rows] < lowest[rows], -torch.inf)
        lowest[rows] = _top_p_min_score(kept, column(parameters[nuclear], "top_p", scores))
    return torch.maximum(lowest, scores.amax(-1, keepdim=True) + column(parameters, "log_min_p", scores))


def column(parameters: ParameterArray, name: str, like: Tensor) -> Tensor:
    """Return one parameter as float32 [rows, 1] on the device of `like`."""
    return torch.from_numpy(np.ascontiguousarray(parameters[name])).to(like.device).unsqueeze(1)


def _top_k_min_score(scores: Tensor, top_k: Tensor) -> Tensor:
    count = min(int(top_k.max()), scores.shape[-1])
    ordered = scores.topk(count, dim=-1).values
    return ordered.gather(1, (top_k - 1).clamp(0, count - 1)).masked_fill(
        (top_k == 0) | (top_k > scores.shape[-1]), -torch.inf
    )


def _top_p_min_score(scores: Tensor, top_p: Tensor, first: int = _NUCLEUS) -> Tensor:
    """Return the score of the last token that is needed to reach `top_p`; the most likely token is always kept."""
    vocab = scores.shape[-1]
    ordered = scores.topk(min(first, vocab), dim=-1).values
    highest = ordered[:, :1]
    total = masses(scores - highest).sum(-1, keepdim=True)
    needed = (top_p.double() * total).ceil().long().clamp(min=1).minimum(total)
    own = masses(ordered - highest)
    count = (own.cumsum(-1) - own < needed).sum(-1, keepdim=True).clamp(min=1)
    if len(scores) and int(count.max()) == ordered.shape[-1] < vocab:  # the nucleus may be larger
        return _top_p_min_score(scores, top_p, first * 8)
    return ordered.gather(1, count - 1)


def masses(x: Tensor) -> Tensor:
    """Return e^x of float32 `x` <= 0 in units of 2^-40, int64; 0 for NaN. The constants are those of Cephes' expf."""
    x = x.nan_to_num(nan=-64.0).clamp(min=-64.0)
    n = (x * 1.44269504 + 0.5).floor_()
    f = (x - n * 0.693359375).add_(n * 2.12194440e-4)
    p = torch.full_like(f, _EXP[0])
    for factor in _EXP[1:]:
        p = p.mul_(f).add_(factor)
    p = p.mul_(f * f).add_(f).add_(1.0)
    power = ((n.int() + 127) << 23).view(torch.float32)
    return (p * power).double().mul_(2.0**40).round_().long()


def log_totals(logits: Tensor) -> Tensor:
    """Return the logarithm of each row's sum of e^logit, float64 [rows], from a sum in units of 2^-44."""
    wide = logits.double()
    highest = wide.amax(-1, keepdim=True)
    shares = (wide - highest).exp_().mul_(2.0**44).round_()
    total = shares.nan_to_num_(0.0).long().sum(-1).double()
    return highest.squeeze(-1) + torch.where(highest.squeeze(-1).isfinite(), total.mul(2.0**-44).log(), 0.0)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign bit; the mask makes the shift logical
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Return standard Gumbel noise, float64, broadcast over `keys` [rows, 1] and `tokens` [vocab] or [rows, k].

    `keys` are noise keys as int64. The same (key, token) gives the same noise on every device and in every batch.
    """
    z = keys + tokens * _signed(GOLDEN)
    z = _xor_shift(z, 30).mul_(_signed(MIX_1))
    z = _xor_shift(z, 27).mul_(_signed(MIX_2))
    z = _xor_shift(z, 31)
    uniform = (z >> 11).bitwise_and_((1 << 53) - 1).double().mul_(2.0**-53).add_(2.0**-54)
    return uniform.log_().neg_().log_().neg_()
