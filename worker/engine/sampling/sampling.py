"""Sampling: draw one token from each row of logits.

Each draw is `argmax(processed logits + Gumbel noise)`, which follows the softmax of the processed logits exactly
(Gumbel-max trick). The noise of a token is a hash of (seed, position, token id). Without generator state, the output
does not depend on the draft, the tree, the batch or a restart. Temperature 0 draws without noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.sampling.native import native_sampler
from worker.engine.segments import IntArray

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_NUCLEUS = 256  # most likely tokens that are searched first for the end of the top_p nucleus


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one sequence."""

    temperature: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    key: int = 0  # 64 bits, from `noise_key`
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, bias); each token once
    logprobs: int | None = None  # most likely tokens to report beside each emitted one; None: report neither

    @property
    def greedy(self) -> bool:
        """True for argmax decoding: no noise is drawn."""
        return self.temperature == 0.0

    @property
    def filtered(self) -> bool:
        """True if top_k, top_p or min_p exclude tokens."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def adjusted(self) -> bool:
        """True if penalties or a bias change the logits; they also apply to argmax decoding."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return any(penalties) or bool(self.logit_bias)


def noise_key(seed: int, choice: int) -> int:
    """Return the 64-bit noise key of one choice: it differs between the choices of a request, and is reproducible."""
    return _mix(_mix(seed & _MASK) + choice)


def _mix(z: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on Python integers."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign bit; the mask makes the shift logical
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Return standard Gumbel noise, float64, broadcast over `keys` [rows, 1] and `tokens` [vocab] or [rows, k].

    `keys` come from `noise_keys`. The same (key, token) gives the same noise on every device and in every batch.
    """
    z = keys + tokens * _signed(_GOLDEN)
    z = _xor_shift(z, 30).mul_(_signed(_MIX_1))
    z = _xor_shift(z, 27).mul_(_signed(_MIX_2))
    z = _xor_shift(z, 31)
    uniform = (z >> 11).bitwise_and_((1 << 53) - 1).double().mul_(2.0**-53).add_(2.0**-54)
    return uniform.log_().neg_().log_().neg_()


def noise_keys(samplings: Sequence[Sampling], positions: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 keys [rows, 1] from the key of each row's sequence and the position of the token to draw."""
    keys = [_signed(_mix(s.key ^ _mix(p))) for s, p in zip(samplings, positions, strict=True)]
    return torch.tensor(keys, dtype=torch.int64, device=device).unsqueeze(1)


def process(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Apply temperature, top_k, top_p and min_p row by row, in that order (as transformers does).

    `logits` [rows, vocab]; returns float32 [rows, vocab] with -inf for excluded tokens. No row may be greedy.
    """
    scores = apply_temperature(logits, samplings)
    return scores.masked_fill_(scores < min_scores(scores, samplings), -torch.inf)


def apply_temperature(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return logits [rows, vocab] divided by their temperatures, float32."""
    return logits.float() / _column([s.temperature for s in samplings], logits)


def min_scores(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return the lowest score [rows, 1] that top_k, top_p and min_p keep; all tokens of an equal score are kept."""
    lowest = scores.new_full((len(scores), 1), -torch.inf)
    if any(s.top_k for s in samplings):
        lowest = _top_k_min_score(scores, [s.top_k for s in samplings])
    nuclear = [row for row, s in enumerate(samplings) if s.top_p < 1.0]
    if nuclear:
        shares = _column([samplings[row].top_p for row in nuclear], scores)
        allowed = scores[nuclear].masked_fill(scores[nuclear] < lowest[nuclear], -torch.inf)
        lowest[nuclear] = torch.maximum(lowest[nuclear], _top_p_min_score(allowed, shares))
    if any(s.min_p > 0.0 for s in samplings):
        least = scores.amax(-1, keepdim=True) + _column([s.min_p for s in samplings], scores).log()
        lowest = torch.maximum(lowest, least)
    return lowest


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)


def _top_k_min_score(scores: Tensor, top_k: list[int]) -> Tensor:
    ordered = scores.topk(min(max(top_k), scores.shape[-1]), dim=-1).values
    column = torch.tensor(top_k, device=scores.device).unsqueeze(1)
    smallest = ordered.gather(1, (column - 1).clamp(0, ordered.shape[-1] - 1))
    return smallest.masked_fill(column == 0, -torch.inf)


def _top_p_min_score(scores: Tensor, top_p: Tensor, first: int = _NUCLEUS) -> Tensor:
    """Return the score of the last token that is needed to reach `top_p`; the most likely token is always kept."""
    vocab = scores.shape[-1]
    ordered = scores.topk(min(first, vocab), dim=-1).values
    highest = ordered[:, :1]
    shares = (ordered - highest).exp() / (scores - highest).exp().sum(-1, keepdim=True)
    needed = (shares.cumsum(-1) - shares < top_p).sum(-1, keepdim=True).clamp(min=1)
    if len(scores) and int(needed.max()) == ordered.shape[-1] < vocab:  # the nucleus may be larger
        return _top_p_min_score(scores, top_p, first * 8)
    return ordered.gather(1, needed - 1)


def draw(
    logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], rows: IntArray | None = None
) -> list[int]:
    """Draw one token from each row of `logits` [n, vocab], for the given positions of their sequences.

    `rows` are the indices of the rows; None: all. A row with a NaN draws -1.
    """
    compiled = native_sampler(logits.device)
    if compiled is not None and logits.dtype == torch.float32 and not any(s.greedy or s.filtered for s in samplings):
        temperatures, keys = (
            _column([s.temperature for s in samplings], logits),
            noise_keys(samplings, positions, logits.device),
        )
        return compiled.draw(logits, temperatures, keys, rows=rows).tolist()
    picked = logits if rows is None else logits[torch.from_numpy(rows).to(logits.device)]
    return _drawn(picked, samplings, positions).tolist()


def _drawn(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    """Return the drawn tokens int64 [rows] for any mix of sampling parameters."""
    sampled = [i for i, s in enumerate(samplings) if not s.greedy]
    if len(sampled) < len(samplings):
        drawn = argmax(logits)
        if sampled:
            drawn[sampled] = _drawn(logits[sampled], [samplings[i] for i in sampled], [positions[i] for i in sampled])
        return drawn
    keys = noise_keys(samplings, positions, logits.device)
    compiled = native_sampler(logits.device)
    if compiled is not None:
        scores = apply_temperature(logits, samplings)
        return compiled.draw(scores, torch.ones(len(scores)), keys, min_scores(scores, samplings))
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    return _torch_argmax(gumbel(keys, tokens).add_(process(logits, samplings)))


def argmax(logits: Tensor) -> Tensor:
    """Return the token with the largest logit of each row of `logits` [rows, vocab], int64 [rows]; -1 if one is NaN."""
    compiled = native_sampler(logits.device)
    return _torch_argmax(logits) if compiled is None else compiled.argmax(logits.float())


def _torch_argmax(scores: Tensor) -> Tensor:
    """Return the index of the highest score of each row; -1 if one is NaN, which `Tensor.argmax` returns first."""
    indices = scores.argmax(-1)
    return indices.masked_fill_(scores.gather(-1, indices.unsqueeze(-1)).squeeze(-1).isnan(), -1)


def topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices and softmax probabilities of the `count` highest scores of each row [rows, n], descending."""
    compiled = native_sampler(scores.device)
    if compiled is not None:
        return compiled.topk(scores, count)
    found = scores.softmax(-1).topk(count, dim=-1)
    return found.indices, found.values.double().nan_to_num_(0.0)


def gumbel_scores(scores: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], tokens: Tensor) -> Tensor:
    """Return processed scores [rows, n] of `tokens` [n] plus the noise of their draws, accurate to about 0.001."""
    keys = noise_keys(samplings, positions, scores.device)
    compiled = native_sampler(scores.device)
    return (scores + gumbel(keys, tokens)).float() if compiled is None else compiled.add_noise(scores, keys, tokens)
