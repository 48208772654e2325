"""Compiled sampling on the CPU: argmax, top-k and draws with Gumbel noise.

On other devices, and without a C compiler, `sampling.py` does the same with torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worker.engine.cpu.compiler import library
from worker.engine.cpu.kernels import bound
from worker.engine.segments import IntArray


class NativeSampler:
    """Calls the compiled functions of `native.c` with tensors."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from native.c."""
        size, address = ctypes.c_int64, ctypes.c_void_p
        self._argmax_rows = bound(compiled.argmax_rows, address, address, size, size)
        self._topk_rows = bound(compiled.topk_rows, *[address] * 3, size, size, size)
        self._draw_rows = bound(compiled.draw_rows, address, size, *[address] * 5, size, size)
        self._add_noise = bound(compiled.add_noise, *[address] * 3, size, size)

    def argmax(self, scores: Tensor) -> Tensor:
        """Return the index [rows] of the highest score of each row of `scores` [rows, vocab]; -1 if one is NaN."""
        scores = scores.contiguous()
        out = torch.empty(len(scores), dtype=torch.int64)
        self._argmax_rows(scores.data_ptr(), out.data_ptr(), *scores.shape)
        return out

    def topk(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return indices and float64 probabilities of the `count` highest scores of each row of `scores` [rows, n]."""
        scores = scores.contiguous()
        indices, probabilities = (torch.empty(len(scores), count, dtype=kind) for kind in (torch.int64, torch.float64))
        self._topk_rows(scores.data_ptr(), indices.data_ptr(), probabilities.data_ptr(), *scores.shape, count)
        return indices, probabilities.nan_to_num_(0.0)  # NaN scores of a broken draft have no value

    def draw(
        self,
        logits: Tensor,
        temperatures: Tensor,
        keys: Tensor,
        min_scores: Tensor | None = None,
        rows: IntArray | None = None,
    ) -> Tensor:
        """Return the tokens int64 [rows] drawn from rows of `logits` [n, vocab]; `rows` are their indices, None: all.

        `temperatures`, `keys` and `min_scores` are [rows]; no token whose scaled logit is below `min_scores` is drawn.
        A row with a NaN draws -1.
        """
        indices = torch.arange(len(logits)) if rows is None else torch.from_numpy(np.ascontiguousarray(rows))
        min_scores = torch.full((len(indices),), -torch.inf) if min_scores is None else min_scores
        out = torch.empty(len(indices), dtype=torch.int64)
        assert (logits.dtype, logits.stride(1)) == (torch.float32, 1)
        parts = (part.data_ptr() for part in (indices, temperatures, keys, min_scores, out))
        self._draw_rows(logits.data_ptr(), logits.stride(0), *parts, len(indices), logits.shape[1])
        return out

    def add_noise(self, scores: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
        """Return `scores` [rows, n] of `tokens` [n] plus their Gumbel noise, accurate to about 0.001."""
        gumbel_scores = scores.clone(memory_format=torch.contiguous_format)
        self._add_noise(gumbel_scores.data_ptr(), keys.data_ptr(), tokens.data_ptr(), *gumbel_scores.shape)
        return gumbel_scores


@cache
def native_sampler(device: torch.device) -> NativeSampler | None:
    """Return the compiled functions; None if they don't run on this device."""
    compiled = library(Path(__file__).with_name("native.c")) if device.type == "cpu" else None
    return None if compiled is None else NativeSampler(compiled)
