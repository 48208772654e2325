"""Attention over packed rows by the compiled kernel: no padding, no masks, one call per layer."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, byref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from worker.engine.attention_options import AttentionOptions
from worker.engine.cpu.kernels import Heads, Kernels, Plan, View, address
from worker.engine.cpu.kv import CpuKv
from worker.engine.segments import IntArray, Segment, Segments, ranges


@dataclass(frozen=True, slots=True)
class _View:
    """What each row sees: entries first..prefix-1 of its slot, then its range of `extra`."""

    first: IntArray  # [rows]
    prefix: IntArray  # [rows]
    extra_start: IntArray  # [rows + 1]
    extra: IntArray  # KV entries, row after row
    group_start: IntArray  # [groups + 1] rows that attend together: of one slot, with one `first`
    end: int  # one past the last entry that a row sees

    def structure(self) -> View:
        """Return the C structure; it points into these arrays."""
        arrays = (self.first, self.prefix, self.extra_start, self.extra, self.group_start)
        return View(*[address(x) for x in arrays], len(self.group_start) - 1, self.end)


class CpuAttentionPlan:
    """An `AttentionPlan` over `CpuKv`."""

    def __init__(self, segments: Sequence[Segment], kv: CpuKv, heads: int, kernels: Kernels) -> None:
        """Plan `segments` for a model with `heads` query heads."""
        packed = Segments.of(segments)
        assert (packed.ends <= kv.capacity).all(), "rows beyond the end of their slot"
        self.kv = kv
        self._segments = packed
        self._kernels = kernels
        self._heads = heads
        self._group_rows = max(1, kernels.block // (heads // kv.kv_heads))  # their query heads are multiplied together
        self.tapped: Tensor | None = None  # [n, taps, width]
        self._slot, self._index = packed.per_row(packed.slots), packed.entries
        self._views: dict[int | None, _View] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Store the rows' keys and values, attend, and return [n, heads, head_dim]; inputs are [heads, n, head_dim].

        The slots hold heads of whole panels: shorter ones are padded with zeros, which changes no sum.
        """
        heads, size = Heads(), query.shape[-1]
        if size != self.kv.head_dim:
            query, key, value = (pad(x, (0, self.kv.head_dim - size)) for x in (query, key, value))
        for name, x in (("query", query), ("key", key), ("value", value)):
            assert x.stride(2) == 1
            setattr(heads, name, x.data_ptr())
            setattr(heads, f"{name}_head", x.stride(0))
            setattr(heads, f"{name}_row", x.stride(1))
        out = torch.empty(len(self._slot), self._heads, query.shape[-1], dtype=query.dtype)
        plan, views = self.structures([options.window], options.scaling)
        plan.softcap = options.softcap or 0.0
        sinks = None if options.sinks is None else options.sinks.detach().float().contiguous()
        plan.sinks = None if sinks is None else sinks.data_ptr()
        keys, values = self.kv.keys[layer].data_ptr(), self.kv.values[layer].data_ptr()
        self._kernels.attend(byref(plan), views, byref(heads), keys, values, out.data_ptr())
        return out if size == self.kv.head_dim else out[..., :size]

    def structures(self, windows: Sequence[int | None], scaling: float) -> tuple[Plan, Array[View]]:
        """Return the C plan and, for each window, what the rows see. They point into this object: keep a reference."""
        plan = Plan(
            rows=len(self._slot),
            heads=self._heads,
            kv_heads=self.kv.kv_heads,
            dim=self.kv.head_dim,
            capacity=self.kv.capacity,
            fp8=self.kv.fp8,
            latent=self.kv.latent_dim,
            slot=address(self._slot),
            index=address(self._index),
            scale=scaling,
        )
        for window in windows:
            if window not in self._views:
                self._views[window] = _view(self._segments, window, self._group_rows)
        return plan, (View * len(windows))(*[self._views[window].structure() for window in windows])


def _view(segments: Segments, window: int | None, group_rows: int) -> _View:
    """Return what the rows see. With a window, a row at position p sees positions above p - window."""
    positions = segments.positions
    prefix = np.where(segments.per_row(segments.chains), segments.entries + 1, segments.per_row(segments.prefixes))
    first = np.zeros_like(prefix) if window is None else np.minimum(np.maximum(positions - window + 1, 0), prefix)
    counts, visible = segments.visible_counts, segments.visible
    rows = np.repeat(np.arange(len(counts)), counts)
    if window is not None:  # the visible entries of a row are its ancestors, at positions `prefix + rank`
        rank = ranges(np.zeros_like(counts), counts)
        seen = prefix[rows] + rank >= positions[rows] - window + 1
        rows, visible = rows[seen], visible[seen]
        counts = np.bincount(rows, minlength=len(counts))
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return _View(
        first=first,
        prefix=prefix,
        extra_start=starts,
        extra=prefix[rows] + visible if len(visible) else np.zeros(1, np.int64),  # the kernel gets its address
        group_start=_group_starts(segments, first, group_rows),
        end=int(segments.ends.max()),
    )


def _group_starts(segments: Segments, first: IntArray, group_rows: int) -> IntArray:
    """Split the rows of each segment where `first` changes, and then every `group_rows` rows."""
    new = np.diff(first, prepend=-1) != 0
    new[segments.firsts] = True
    rows = np.arange(len(first))
    since = rows - np.maximum.accumulate(np.where(new, rows, 0))  # rows since the last split
    return np.append(np.flatnonzero(since % group_rows == 0), len(first))
