"""Attention over packed rows by the compiled kernel: no padding, no masks, one call a layer.

layers, attention -> [native_attention] -> native_kv, kernels. A row lists what it sees: a stretch of its slot, then the
entries of its ancestors in order of depth. A tree row therefore adds up in the very order in which it would alone, and
gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, byref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker.engine.kernels import Heads, Kernels, Plan, View
from worker.engine.native_kv import NativeKv
from worker.engine.rows import IntArray, Segment


@dataclass(frozen=True, slots=True)
class _View:
    """What each row sees: entries first..prefix-1 of its slot, then its part of `extra`."""

    first: IntArray  # [rows]
    prefix: IntArray  # [rows]
    extra_start: IntArray  # [rows + 1]
    extra: IntArray  # KV entries, by row
    end: int  # behind the last entry that any row sees

    def structure(self) -> View:
        """Return what the kernel reads; it points into these arrays."""
        return View(*[x.ctypes.data for x in (self.first, self.prefix, self.extra_start, self.extra)], self.end)


class NativePlan:
    """Where the rows of one forward go and what they see. Built once a step, used by every layer."""

    def __init__(self, segments: Sequence[Segment], kv: NativeKv, heads: int, kernels: Kernels) -> None:
        """Plan `segments` for a model with `heads` query heads."""
        assert all(s.end <= kv.capacity for s in segments), "rows beyond the end of their slot"
        self.kv = kv
        self._segments = segments
        self._kernels = kernels
        self._heads = heads
        self.tapped: Tensor | None = None  # [n, taps, width] outputs of tapped layers, once they have run
        self._slot = np.repeat([s.slot for s in segments], [len(s.ids) for s in segments])
        self._index = np.concatenate([np.arange(s.start, s.end) for s in segments])
        self._views: dict[int | None, _View] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Store the rows' keys and values, attend, and return [n, heads, head_dim]; inputs are [heads, n, head_dim]."""
        heads = Heads()
        for name, x in (("query", query), ("key", key), ("value", value)):
            assert x.stride(2) == 1
            setattr(heads, name, x.data_ptr())
            setattr(heads, f"{name}_head", x.stride(0))
            setattr(heads, f"{name}_row", x.stride(1))
        out = torch.empty(len(self._slot), self._heads, query.shape[-1], dtype=query.dtype)
        plan, views = self.structures([window], scaling)
        keys, values = self.kv.keys[layer].data_ptr(), self.kv.values[layer].data_ptr()
        self._kernels.attend(byref(plan), views, byref(heads), keys, values, out.data_ptr())
        return out

    def structures(self, windows: Sequence[int | None], scaling: float) -> tuple[Plan, Array[View]]:
        """Return the plan and, for each window, what the rows see. They point into this object: keep it."""
        plan = Plan(
            rows=len(self._slot),
            heads=self._heads,
            kv_heads=self.kv.kv_heads,
            dim=self.kv.head_dim,
            capacity=self.kv.capacity,
            slot=self._slot.ctypes.data,
            index=self._index.ctypes.data,
            scale=scaling,
        )
        for window in windows:
            if window not in self._views:
                self._views[window] = _view(self._segments, window)
        return plan, (View * len(windows))(*[self._views[window].structure() for window in windows])


def _view(segments: Sequence[Segment], window: int | None) -> _View:
    """Return what the rows see. A row at position p sees the texts at positions above p - window."""
    positions = np.concatenate([s.positions for s in segments])
    first = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
    prefix = np.concatenate(
        [s.start + 1 + np.arange(len(s.ids)) if s.visible is None else _prefix(s) for s in segments]
    )
    counts, extra = [], []
    row = 0
    for s in segments:
        if s.visible is None:
            counts.append(np.zeros(len(s.ids), np.int64))
        else:
            # entry `prefix + c` seen by a row is its ancestor at position `prefix + rank`
            seen = s.visible & (s.prefix + s.visible.cumsum(axis=1) - 1 >= first[row : row + len(s.ids), None])
            counts.append(seen.sum(axis=1))
            extra.append(s.prefix + np.nonzero(seen)[1])
        row += len(s.ids)
    return _View(
        first=np.minimum(first, prefix),
        prefix=prefix,
        extra_start=np.concatenate([[0], np.concatenate(counts).cumsum()]),
        extra=np.concatenate([*extra, np.zeros(1, np.int64)]),  # never empty: its address is taken
        end=max(s.end for s in segments),
    )


def _prefix(s: Segment) -> IntArray:
    return np.full(len(s.ids), s.prefix)
