"""Sampling: draw one token from each row of logits.

Each draw is `argmax(processed logits + Gumbel noise)`, which follows the softmax of the processed logits exactly
(Gumbel-max trick). The noise of a token is a hash of (seed, position, token id). Without generator state, the output
does not depend on the draft, the tree, the batch or a restart. Temperature 0 draws without noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.engine.sampling import torch_draws
from worker.engine.sampling.native import native_sampler
from worker.engine.sampling.parameters import PARAMETERS, Adjustments, ParameterArray, Sampling, noise_keys
from worker.engine.segments import IntArray

_GREEDY = Sampling().record


@cache
def gpu_sampler(device: torch.device) -> ModuleType | None:
    """Return the module of Triton kernels for a GPU; None for other devices, and without Triton."""
    try:
        return import_module("worker.engine.sampling.gpu_kernels") if device.type == "cuda" else None
    except ImportError:
        return None


def parameters_of(samplings: Sequence[Sampling]) -> ParameterArray:
    """Return the parameters [rows] of some sequences."""
    records: list[Any] = [s.record for s in samplings]
    return np.frombuffer(bytearray().join(records), PARAMETERS)  # np.concatenate compares all fields: 8 us a row


def draw(
    logits: Tensor,
    parameters: ParameterArray,
    positions: IntArray,
    rows: IntArray | None = None,
    adjustments: Adjustments | None = None,
    mask: Tensor | None = None,
) -> IntArray:
    """Draw one token from each row: bias and penalties, mask, temperature, top_k, top_p, min_p, then the noise.

    `parameters` [n] and `positions` [n], those of the tokens in their sequences, belong to the rows `rows` [n] of
    `logits` [m, vocab]; None: to all. So do `adjustments` and `mask`, int32 [n, ceil(vocab / 32)]: bit i of a row's
    word w allows the token 32 w + i. Returns int64 [n]; -1 for a row with a NaN, or whose mask allows no token.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.stride(-1) != 1:
        logits = logits.float().contiguous()
    mask = None if mask is None else mask.to(logits.device).contiguous()
    compiled = native_sampler(logits.device)
    if compiled is not None:
        return compiled.draw(logits, parameters, positions, rows, adjustments, mask)
    keys = noise_keys(parameters, positions)
    on_gpu = gpu_sampler(logits.device)
    if on_gpu is not None:
        tokens: Tensor = on_gpu.draw(logits, parameters, keys, rows, adjustments, mask)[0]
        return tokens.cpu().numpy()
    picked = logits.float() if rows is None else logits[torch.from_numpy(rows).to(logits.device)].float()
    if adjustments is not None:
        picked = torch_draws.adjust(picked, parameters, adjustments)
    on_device = torch.from_numpy(keys.view(np.int64)).to(logits.device).unsqueeze(1)
    return torch_draws.draw(picked, parameters, on_device, mask).cpu().numpy()


def prepare(logits: Tensor) -> None:
    """Compile the kernels that draw from such rows before the first request: on a GPU that takes seconds."""
    starts, none = np.zeros(2, np.int64), np.empty(0, np.int64)
    unchanged = Adjustments(starts, none, np.empty(0, np.float32), starts, none, none)
    everything = torch.full((1, -(-logits.shape[1] // 32)), -1, dtype=torch.int32)
    for sampling in (Sampling(1.0, top_p=0.5), Sampling(1.0, top_p=0.5, presence_penalty=1.0)):
        for mask in (None, everything):
            draw(logits[:1], sampling.record, np.zeros(1, np.int64), adjustments=unchanged, mask=mask)


def argmax(logits: Tensor) -> IntArray:
    """Return the token with the largest logit of each row of `logits` [rows, vocab], int64 [rows]; -1 if one is NaN."""
    compiled = native_sampler(logits.device)
    if compiled is not None and logits.dtype in (torch.float32, torch.bfloat16) and logits.stride(-1) == 1:
        return compiled.argmax(logits)
    return draw(logits, np.repeat(_GREEDY, len(logits)), np.zeros(len(logits), np.int64))


def process(logits: Tensor, parameters: ParameterArray) -> Tensor:
    """Apply temperature, top_k, top_p and min_p to `logits` [rows, vocab], in that order (as transformers does).

    Returns float32 [rows, vocab] with -inf for excluded tokens. No row may be greedy.
    """
    compiled = native_sampler(logits.device)
    if compiled is not None:
        return compiled.process(logits.float().contiguous(), parameters)
    on_gpu = gpu_sampler(logits.device)
    if on_gpu is None:
        return torch_draws.process(logits, parameters)
    _, lowest = on_gpu.draw(logits, parameters, parameters["key"])
    scores = torch_draws.apply_temperature(logits, parameters)
    return scores.masked_fill_(scores < lowest.unsqueeze(1), -torch.inf)


def adjust(logits: Tensor, parameters: ParameterArray, adjustments: Adjustments) -> Tensor:
    """Return `logits` [rows, vocab] under logit_bias, then repetition, frequency and presence penalties, as float32.

    Repetition is transformers' (prompt and output; divides or multiplies); frequency and presence are OpenAI's (output,
    subtract).
    """
    compiled = native_sampler(logits.device)
    if compiled is None:
        return torch_draws.adjust(logits, parameters, adjustments)
    return compiled.adjust(logits.float().contiguous(), parameters, adjustments)


def log_totals(logits: Tensor) -> Tensor:
    """Return the logarithm of each row's sum of e^logit, float64 [rows] from [rows, vocab]: the same in any batch."""
    compiled = native_sampler(logits.device)
    if compiled is None:
        return torch_draws.log_totals(logits)
    return compiled.log_totals(logits.float().contiguous())


def topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices and softmax probabilities of the `count` highest scores of each row [rows, n], descending."""
    compiled = native_sampler(scores.device)
    if compiled is not None:
        return compiled.topk(scores, count)
    found = scores.softmax(-1).topk(count, dim=-1)
    return found.indices, found.values.double().nan_to_num_(0.0)


def gumbel_scores(scores: Tensor, parameters: ParameterArray, positions: IntArray, tokens: Tensor) -> Tensor:
    """Return processed scores [rows, n] of `tokens` [n] plus the noise of their draws, accurate to about 0.001."""
    keys = torch.from_numpy(noise_keys(parameters, positions).view(np.int64)).to(scores.device).unsqueeze(1)
    compiled = native_sampler(scores.device)
    if compiled is None:
        return (scores + torch_draws.gumbel(keys, tokens)).float()
    return compiled.add_noise(scores, keys, tokens)
