"""Noise on the CPU: the draws of sampling.py by compiled code, which looks closely at the few tokens that can win.

sampling -> [noise] -> compiler.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from worker.engine.compiler import library
from worker.engine.kernels import bound


class Noise:
    """The compiled functions."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from noise.c."""
        size, address = ctypes.c_int64, ctypes.c_void_p
        self._draw_rows = bound(compiled.draw_rows, *[address] * 4, size, size)
        self._add_noise = bound(compiled.add_noise, *[address] * 3, size, size)

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
def noise(device: torch.device) -> Noise | None:
    """Return the compiled functions if they run on this device."""
    compiled = library(Path(__file__).with_name("noise.c")) if device.type == "cpu" else None
    return None if compiled is None else Noise(compiled)
