"""Compiled sampling on the CPU: draws, processed scores, and top-k and noise for drafts.

Without a C compiler `torch_draws.py` does the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.cpu.compiler import EXACT, library
from worker.engine.cpu.kernels import address, bound
from worker.engine.sampling.parameters import PARAMETERS, Adjustments, ParameterArray, Sampling
from worker.engine.segments import IntArray

_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_LISTS = tuple(field.name for field in fields(Adjustments))
_NO_LISTS = [None] * len(_LISTS)
_INDICES = np.arange(1024)  # of most steps' rows


class _Rows(ctypes.Structure):
    """`rows_t`: the rows to draw from."""

    _fields_ = (
        ("logits", _ADDRESS),
        *((name, _SIZE) for name in ("stride", "halves", "rows", "columns")),
        *((name, _ADDRESS) for name in ("indices", "parameters", "positions", "bias_starts", "bias_tokens", "biases")),
        *((name, _ADDRESS) for name in ("seen_starts", "seen_tokens", "seen_counts", "mask", "scratch")),
        ("threads", _SIZE),
    )


class RankingFunctions(NamedTuple):
    """Addresses of what ranks drafts, for other compiled code."""

    topk: int  # `topk_rows` of drafts.c
    process: int  # `process_rows` of native.c
    add_noise: int  # of drafts.c
    scratch_size: Callable[[int], int]  # bytes that `process` needs a thread, by the number of columns


class NativeSampler:
    """Calls the compiled functions with tensors. Logits are float32 or bfloat16 [n, vocab], contiguous in each row."""

    def __init__(self, compiled: ctypes.CDLL, drafts: ctypes.CDLL) -> None:
        """Bind the functions of libraries compiled from native.c and drafts.c."""
        rows = ctypes.POINTER(_Rows)
        self._draw_rows = bound(compiled.draw_rows, rows, _ADDRESS)
        self._process_rows = bound(compiled.process_rows, rows, _ADDRESS)
        self._adjust_rows = bound(compiled.adjust_rows, rows, _ADDRESS)
        self._log_total_rows = bound(compiled.log_total_rows, rows, _ADDRESS)
        self._scratch_size = bound(compiled.scratch_size, _SIZE, result=_SIZE)
        self.ranking = RankingFunctions(
            _address_of(drafts.topk_rows),
            _address_of(compiled.process_rows),
            _address_of(drafts.add_noise),
            self._scratch_size,
        )
        self._topk_rows = bound(drafts.topk_rows, *[_ADDRESS] * 3, _SIZE, _SIZE, _SIZE)
        self._add_noise = bound(drafts.add_noise, *[_ADDRESS] * 3, _SIZE, _SIZE)

    def draw(
        self,
        logits: Tensor,
        parameters: ParameterArray,
        positions: IntArray,
        indices: IntArray | None = None,
        adjustments: Adjustments | None = None,
        mask: Tensor | None = None,
    ) -> IntArray:
        """Return the tokens [rows] that `sampling.draw` describes."""
        drawn = np.empty(len(parameters), np.int64)
        self._run(self._draw_rows, logits, parameters, (drawn,), positions, indices, adjustments, mask)
        return drawn

    def argmax(self, logits: Tensor) -> IntArray:
        """Return the tokens [rows] that `draw` returns at temperature 0: most steps draw nothing else."""
        (count, columns), drawn = logits.shape, np.empty(len(logits), np.int64)
        threads = min(count, torch.get_num_threads())
        scratch = np.empty(threads * self._scratch_size(columns), np.uint8)
        if count:
            indices, parameters = _greedy(1 << (count - 1).bit_length())
            form = (logits.data_ptr(), logits.stride(0), logits.dtype == torch.bfloat16, count, columns)
            rows = _Rows(*form, indices, parameters, indices, *_NO_LISTS, None, address(scratch), threads)
            self._draw_rows(rows, address(drawn))
        return drawn

    def process(self, logits: Tensor, parameters: ParameterArray) -> Tensor:
        """Return float32 scores [rows, vocab] of `logits`, -inf for tokens that the filters exclude."""
        scores = torch.empty(logits.shape)
        self._run(self._process_rows, logits, parameters, (scores.numpy(),))
        return scores

    def adjust(self, logits: Tensor, parameters: ParameterArray, adjustments: Adjustments) -> Tensor:
        """Return float32 logits [rows, vocab] under penalties and bias."""
        scores = torch.empty(logits.shape)
        self._run(self._adjust_rows, logits, parameters, (scores.numpy(),), adjustments=adjustments)
        return scores

    def log_totals(self, logits: Tensor) -> Tensor:
        """Return the logarithm of each row's sum of e^logit, float64 [rows]."""
        totals = np.empty(len(logits), np.float64)
        self._run(self._log_total_rows, logits, np.zeros(len(logits), PARAMETERS), (totals,))
        return torch.from_numpy(totals)

    def _run(
        self,
        function: Callable[..., None],
        logits: Tensor,
        parameters: ParameterArray,
        results: tuple[NDArray[Any], ...],
        positions: IntArray | None = None,
        indices: IntArray | None = None,
        adjustments: Adjustments | None = None,
        mask: Tensor | None = None,
    ) -> None:
        count, columns = len(parameters), logits.shape[1]
        if not count:
            return
        threads = min(count, torch.get_num_threads())
        scratch = np.empty(threads * self._scratch_size(columns), np.uint8)
        if indices is None:
            indices = _INDICES[:count] if count <= len(_INDICES) else np.arange(count)
        else:
            indices = np.ascontiguousarray(indices, np.int64)
        parameters = np.ascontiguousarray(parameters)
        positions = None if positions is None else np.ascontiguousarray(positions, np.int64)
        lists = _NO_LISTS if adjustments is None else [address(getattr(adjustments, name)) for name in _LISTS]
        function(
            _Rows(
                logits.data_ptr(), logits.stride(0), logits.dtype == torch.bfloat16, count, columns, address(indices),
                address(parameters), None if positions is None else address(positions), *lists,
                None if mask is None else mask.data_ptr(), address(scratch), threads,
            ),
            *map(address, results),
        )  # fmt: skip

    def topk(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return indices and float64 probabilities of the `count` highest scores of each row of `scores` [rows, n]."""
        scores = scores.contiguous()
        indices, probabilities = (torch.empty(len(scores), count, dtype=kind) for kind in (torch.int64, torch.float64))
        self._topk_rows(scores.data_ptr(), indices.data_ptr(), probabilities.data_ptr(), *scores.shape, count)
        return indices, probabilities.nan_to_num_(0.0)  # NaN scores of a broken draft have no value

    def add_noise(self, scores: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
        """Return `scores` [rows, n] of `tokens` [n] plus their Gumbel noise, accurate to about 0.001."""
        gumbel_scores = scores.clone(memory_format=torch.contiguous_format)
        self._add_noise(gumbel_scores.data_ptr(), keys.data_ptr(), tokens.data_ptr(), *gumbel_scores.shape)
        return gumbel_scores


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def _greedy(rows: int) -> tuple[int, int]:
    """Return the addresses of 0, 1, 2, … and of the parameters of temperature 0, for up to `rows` rows."""
    indices, parameters = np.arange(rows), np.repeat(Sampling().record, rows)
    _KEPT.extend((indices, parameters))
    return address(indices), address(parameters)


_KEPT: list[NDArray[Any]] = []  # arrays of which only the addresses are in use


@cache
def native_sampler(device: torch.device) -> NativeSampler | None:
    """Return the compiled functions; None if they don't run on this device."""
    if device.type != "cpu":
        return None
    folder = Path(__file__).parent
    compiled, drafts = library(folder / "native.c", *EXACT), library(folder / "drafts.c")
    return None if compiled is None or drafts is None else NativeSampler(compiled, drafts)


@cache
def ranking_functions(device: torch.device) -> RankingFunctions | None:
    """Return the functions that rank drafts; None if they don't run on this device."""
    sampler = native_sampler(device)
    return None if sampler is None else sampler.ranking
