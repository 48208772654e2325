"""From rows of scores to tokens on the CPU, by compiled code.

verifier, sampling, ranking -> [draws] -> compiler.  Elsewhere, and without a C compiler, torch does the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worker.engine.compiler import library
from worker.engine.kernels import address, bound
from worker.engine.rows import IntArray


class Draws:
    """The compiled functions."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from draws.c."""
        size, address = ctypes.c_int64, ctypes.c_void_p
        self._argmax_rows = bound(compiled.argmax_rows, address, address, size, size)
        self._best_rows = bound(compiled.best_rows, *[address] * 3, size, size, size)
        self._draw_rows = bound(compiled.draw_rows, address, size, *[address] * 5, size, size)
        self._add_noise = bound(compiled.add_noise, *[address] * 3, size, size)

    def likeliest(self, scores: Tensor) -> Tensor:
        """Return the place [rows] of the highest score of each row of `scores` [rows, vocab]."""
        scores = scores.contiguous()
        out = torch.empty(len(scores), dtype=torch.int64)
        self._argmax_rows(scores.data_ptr(), out.data_ptr(), *scores.shape)
        return out

    def best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the places of the `count` best of each row of `scores` [rows, n], and their probabilities, float64."""
        scores = scores.contiguous()
        places, probabilities = (torch.empty(len(scores), count, dtype=kind) for kind in (torch.int64, torch.float64))
        self._best_rows(scores.data_ptr(), places.data_ptr(), probabilities.data_ptr(), *scores.shape, count)
        return places, probabilities

    def draw(
        self, logits: Tensor, places: IntArray, temperatures: Sequence[float], keys: IntArray, floors: Tensor | None
    ) -> list[int]:
        """Return what is drawn from the rows of `logits` [n, vocab] at `places` [rows], with `keys` [rows].

        What is drawn over its temperature is not below `floors` [rows, 1], if there are any.
        """
        lowest = np.full(len(places), -np.inf, np.float32) if floors is None else floors.flatten().numpy()
        out = np.empty(len(places), np.int64)
        parts = (np.ascontiguousarray(places), np.array(temperatures, np.float32), keys, lowest, out)
        assert (logits.dtype, logits.stride(1)) == (torch.float32, 1)
        self._draw_rows(logits.data_ptr(), logits.stride(0), *map(address, parts), len(places), logits.shape[1])
        drawn: list[int] = out.tolist()
        return drawn

    def add(self, scores: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
        """Return `scores` [rows, n] of `tokens` [n] with noise, which is right to about a thousandth."""
        noisy = scores.clone(memory_format=torch.contiguous_format)
        self._add_noise(noisy.data_ptr(), keys.data_ptr(), tokens.data_ptr(), *noisy.shape)
        return noisy


@cache
def draws(device: torch.device) -> Draws | None:
    """Return the compiled functions if they run on this device."""
    compiled = library(Path(__file__).with_name("draws.c")) if device.type == "cpu" else None
    return None if compiled is None else Draws(compiled)
