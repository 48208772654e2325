"""From rows of scores to tokens on the CPU, by compiled code.

verifier, sampling, ranking -> [draws] -> compiler.  Elsewhere, and without a C compiler, torch does the same.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from worker.engine.compiler import library
from worker.engine.kernels import bound


class Draws:
    """The compiled functions."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from draws.c."""
        size, address = ctypes.c_int64, ctypes.c_void_p
        self._argmax_rows = bound(compiled.argmax_rows, address, address, size, size)
        self._best_rows = bound(compiled.best_rows, *[address] * 3, size, size, size)
        self._draw_rows = bound(compiled.draw_rows, *[address] * 4, size, size)
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

    def draw(self, scores: Tensor, keys: Tensor, floors: Tensor) -> Tensor:
        """Return the draw [rows] of each row of `scores` [rows, vocab] among tokens not below `floors` [rows, 1]."""
        scores = scores.contiguous()
        out = torch.empty(len(scores), dtype=torch.int64)
        self._draw_rows(scores.data_ptr(), keys.data_ptr(), floors.data_ptr(), out.data_ptr(), *scores.shape)
        return out

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
