"""Attention over paged KV: a stretch of every sequence, and the entries that a row lists behind it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from worker.engine.errors import ModelRefused
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import PagedRows, exact_shape, laid_out, on_device
from worker.engine.segments import Segment

GPU_BLOCK = 64  # entries of a block on a GPU: few numbers in a table, little left empty
_GATHERED_ROWS = 64  # rows whose stretches are gathered together: bounds the memory of a long prompt

Part = tuple[Tensor, Tensor]  # outputs [n, heads, head_dim], and float32 logs of the sums of exponentials [n, heads]


def gpu_kernels_for(device: torch.device) -> ModuleType | None:
    """Return the module of compiled kernels for a device, or None for one that torch alone serves.

    Raises ModelRefused, with what to do, for a GPU without Triton, whose texts would depend on the batch.
    """
    if device.type != "cuda":
        return None
    try:
        return import_module("worker.engine.gpu.kernels")
    except ImportError as missing:
        raise ModelRefused(
            f"{missing}: on a GPU our kernels need Triton, which torch brings on Linux; pip install triton, in the "
            "release that your torch asks for"
        ) from missing


class PagedAttentionPlan:
    """Where the rows of one forward go and what they see. Used by every layer."""

    def __init__(self, rows: PagedRows, kv: PagedKv) -> None:
        """Attend `rows` in `kv`, whose blocks they own already."""
        self.rows, self.kv = rows, kv
        self.tapped: Tensor | None = None  # [n, taps, width] outputs of tapped layers, once they have run
        self._kernels = gpu_kernels_for(kv.keys.device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Store the rows' keys and values, attend, and return [n, heads, head_dim]; inputs are [heads, n, head_dim]."""
        self.kv.write(layer, self.rows.entries, key.transpose(0, 1), value.transpose(0, 1))
        return self.attend_stored(layer, query.transpose(0, 1).contiguous(), scaling, window)

    def attend_stored(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Tensor:
        """Attend `query` [n, heads, head_dim] of rows whose keys and values are stored."""
        if self._kernels is not None:
            out: Tensor = self._kernels.attend(query, self.rows, self.kv, layer, scaling, window)
            return out
        part = self._gathered(layer, query, scaling, window)
        if not self.rows.shape.listed:
            return part[0]
        return merged(part, self._listed(layer, query, scaling, window)).to(query.dtype)

    def _gathered(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Part:
        """Attend the stretches row by row, from copies."""
        slices = range(0, len(query), _GATHERED_ROWS)
        parts = [self._gather(layer, query, scaling, window, slice(at, at + _GATHERED_ROWS)) for at in slices]
        outs, logs = zip(*parts, strict=True)
        return torch.cat(outs).to(query.dtype), torch.cat(logs)

    def _gather(self, layer: int, query: Tensor, scaling: float, window: int | None, some: slice) -> Part:
        rows, size = self.rows, self.kv.block_size
        positions, seen = rows.positions[some], rows.seen[some]
        width, first = rows.shape.blocks, torch.zeros_like(positions)
        if window is not None:  # what lies before the window is not read
            width = min(width, -(-window // size) + 1)
            first = ((positions - window + 1) // size).clamp(0, rows.shape.blocks - width)
        blocks = first.unsqueeze(1) + torch.arange(width, device=first.device)  # [n, width]
        entries = (blocks.unsqueeze(2) * size + torch.arange(size, device=first.device)).flatten(1)  # [n, width * size]
        visible = entries < seen.unsqueeze(1)
        if window is not None:
            visible &= positions.unsqueeze(1) - entries < window
        held = rows.table[rows.sequence[some]].gather(1, blocks)
        keys, values = (store[layer][held].flatten(1, 2) for store in (self.kv.keys, self.kv.values))
        return attended(query[some], keys, values, visible, scaling)

    def _listed(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Part:
        """Attend the entries that each row lists: its ancestors in order of depth, and itself."""
        rows = self.rows
        rank = torch.arange(rows.shape.listed, device=query.device)
        visible = rank < rows.own_count.unsqueeze(1)
        if window is not None:  # the entries of a row end at its own position and go up one by one
            visible &= rows.own_count.unsqueeze(1) - 1 - rank < window
        keys, values = (store[layer].flatten(0, 1)[rows.own] for store in (self.kv.keys, self.kv.values))
        return attended(query, keys, values, visible, scaling)


def paged_plan(segments: Sequence[Segment], kv: PagedKv) -> PagedAttentionPlan:
    """Return the plan of a forward over `segments` in its exact shape."""
    reserve(segments, kv)
    shape = exact_shape(segments, kv)
    return PagedAttentionPlan(PagedRows(shape, on_device(laid_out(segments, kv, shape), kv.keys.device)), kv)


def reserve(segments: Sequence[Segment], kv: PagedKv) -> None:
    """Give every segment the blocks that its rows are written to."""
    for s in segments:
        if s.visible is None:
            kv.truncate(s.slot, s.end)  # behind a stretch of text there is nothing: what lies there is an older one
        kv.reserve(s.slot, s.start, s.end)


def attended(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Part:
    """Attend `query` [n, heads, dim] in float32 over those of `keys`, `values` [n, entries, kv_heads, dim] it sees.

    A row that sees nothing gets zeros, and the log of nothing.
    """
    n, heads, dim = query.shape
    grouped = query.view(n, keys.shape[2], -1, dim).float()
    scores = torch.einsum("nhgd,nlhd->nhgl", grouped, keys.float()) * scaling
    scores = scores.masked_fill(~visible[:, None, None, :], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    out = torch.einsum("nhgl,nlhd->nhgd", weights, values.float())
    return out.reshape(n, heads, dim), lse.reshape(n, heads)


def merged(one: Part, other: Part) -> Tensor:
    """Return the attention over the entries of both parts, of which a row sees at least one."""
    (a, log_a), (b, log_b) = one, other
    top = torch.maximum(log_a, log_b)
    weight_a, weight_b = (log_a - top).exp().unsqueeze(-1), (log_b - top).exp().unsqueeze(-1)
    return (a.float() * weight_a + b.float() * weight_b) / (weight_a + weight_b)
