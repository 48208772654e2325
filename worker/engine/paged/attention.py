"""Attention over paged KV: each row sees a prefix of its sequence, and then the entries that it lists."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from worker.engine.attention_options import AttentionOptions
from worker.engine.errors import ModelRefused
from worker.engine.paged.compiled_layout import compiled_layout
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import PagedRows, exact_shape, laid_out, on_device
from worker.engine.segments import Segment, Segments

GPU_BLOCK = 64  # KV entries of a block on a GPU: a compromise of small tables and little unused memory
_GATHERED_ROWS = 64  # rows whose prefixes are gathered together: bounds the memory of a long prompt

Part = tuple[Tensor, Tensor]  # outputs [n, heads, head_dim], and their float32 logsumexp of scores [n, heads]


def gpu_kernels_for(device: torch.device) -> ModuleType | None:
    """Return the module of Triton kernels for a GPU, None for other devices.

    Raises ModelRefused, with what to do, for a GPU without Triton: torch's results would depend on the batch.
    """
    if device.type != "cuda":
        return None
    try:
        return import_module("worker.engine.gpu.kernels")
    except ImportError as missing:
        raise ModelRefused(
            f"{missing}: GPUs need Triton, which torch installs on Linux; pip install triton, in the version that "
            "your torch requires"
        ) from missing


class PagedAttentionPlan:
    """An `AttentionPlan` over paged KV."""

    def __init__(self, rows: PagedRows, kv: PagedKv) -> None:
        """Attend `rows` in `kv`; the blocks that they write to are reserved."""
        self.rows, self.kv = rows, kv
        self.tapped: Tensor | None = None  # [n, taps, width]
        self._kernels = gpu_kernels_for(kv.keys.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Store the rows' keys and values, attend, and return [n, heads, head_dim]; inputs are [heads, n, head_dim]."""
        self.kv.write(layer, self.rows.entries, key.transpose(0, 1), value.transpose(0, 1))
        return self.attend_stored(layer, query.transpose(0, 1).contiguous(), options)

    def attend_stored(self, layer: int, query: Tensor, options: AttentionOptions) -> Tensor:
        """Attend `query` [n, heads, head_dim]; the rows' keys and values are stored already."""
        if self._kernels is not None:
            out: Tensor = self._kernels.attend(query, self.rows, self.kv, layer, options)
            return out
        part = self._attend_prefixes(layer, query, options)
        if self.rows.shape.listed:
            part = merged(part, self._attend_listed(layer, query, options))
        return (part[0] if options.sinks is None else with_sinks(part, options.sinks)).to(query.dtype)

    def _attend_prefixes(self, layer: int, query: Tensor, options: AttentionOptions) -> Part:
        """Attend the prefixes, from gathered copies of their blocks."""
        slices = range(0, len(query), _GATHERED_ROWS)
        parts = [self._attend_some(layer, query, options, slice(at, at + _GATHERED_ROWS)) for at in slices]
        outs, logs = zip(*parts, strict=True)
        return torch.cat(outs).to(query.dtype), torch.cat(logs)

    def _attend_some(self, layer: int, query: Tensor, options: AttentionOptions, some: slice) -> Part:
        rows, size, window = self.rows, self.kv.block_size, options.window
        positions, seen = rows.positions[some], rows.seen[some]
        width, first = rows.shape.blocks, torch.zeros_like(positions)
        if window is not None:  # do not read blocks before the window
            width = min(width, -(-window // size) + 1)
            first = ((positions - window + 1) // size).clamp(0, rows.shape.blocks - width)
        blocks = first.unsqueeze(1) + torch.arange(width, device=first.device)  # [n, width]
        entries = (blocks.unsqueeze(2) * size + torch.arange(size, device=first.device)).flatten(1)  # [n, width * size]
        visible = entries < seen.unsqueeze(1)
        if window is not None:
            visible &= positions.unsqueeze(1) - entries < window
        blocks_held = self.kv.device_tables[rows.slots[rows.sequence[some]]].gather(1, blocks)
        keys, values = self.kv.read_blocks(layer, blocks_held)
        return attended(query[some], keys, values, visible, options)

    def _attend_listed(self, layer: int, query: Tensor, options: AttentionOptions) -> Part:
        """Attend the entries that each row lists: its ancestors in order of depth, and itself."""
        rows = self.rows
        rank = torch.arange(rows.shape.listed, device=query.device)
        visible = rank < rows.own_count.unsqueeze(1)
        if options.window is not None:  # the listed entries of a row have consecutive positions, the last is its own
            visible &= rows.own_count.unsqueeze(1) - 1 - rank < options.window
        keys, values = self.kv.read(layer, rows.own)
        return attended(query, keys, values, visible, options)


def paged_plan(segments: Sequence[Segment], kv: PagedKv) -> PagedAttentionPlan:
    """Return the plan of a forward over `segments`, without padding."""
    packed = Segments.of(segments)
    reserve(packed, kv)
    kv.sync_tables()
    shape = exact_shape(packed, kv)
    return PagedAttentionPlan(PagedRows(shape, on_device(laid_out(packed, kv, shape), kv.keys.device)), kv)


def reserve(segments: Segments, kv: PagedKv) -> None:
    """Reserve the blocks that the rows of each segment are written to."""
    compiled = compiled_layout()
    if compiled is not None and compiled.prepared(segments, kv):
        return
    slots, starts, ends, chains = segments.slots, segments.starts, segments.ends, segments.chains
    # Entries behind a chain are stale: free them. Most steps write into blocks that their slots hold already.
    due = ~kv.writable(slots, starts, ends) | (chains & kv.holds_beyond(slots, ends))
    for at in np.flatnonzero(due).tolist():
        slot, start, end = int(slots[at]), int(starts[at]), int(ends[at])
        if chains[at]:
            kv.truncate(slot, end)
        kv.reserve(slot, start, end)


def attended(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, options: AttentionOptions) -> Part:
    """Attend `query` [n, heads, dim] in float32 over the visible `keys` and `values` [n, entries, kv_heads, dim].

    A row that sees nothing gets zeros and a logsumexp of -inf. KV heads are attended one by one, so that the bits of a
    head don't depend on the number of others: ranks deal them out.
    """
    kv_heads = keys.shape[2]
    queries = query.float().chunk(kv_heads, 1)
    heads = [
        _attended_head(queries[head], keys[:, :, head].float(), values[:, :, head].float(), visible, options)
        for head in range(kv_heads)
    ]
    outs, logs = zip(*heads, strict=True)
    return torch.cat(outs, 1), torch.cat(logs, 1)


def _attended_head(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, options: AttentionOptions) -> Part:
    """Attend the queries [n, group, dim] of one KV head over its `keys` and `values` [n, entries, dim].

    What a row does not see may be anything, NaN too, and zero times NaN is NaN: so its scores and values are replaced,
    not only weighted with zero.
    """
    scores = (query.contiguous() @ keys.contiguous().transpose(1, 2)) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~visible[:, None, :], -torch.inf)
    log = scores.logsumexp(-1)
    weights = (scores - log.masked_fill(log == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return weights @ values.masked_fill(~visible[:, :, None], 0.0).contiguous(), log


def merged(one: Part, other: Part) -> Part:
    """Merge the attention over two sets of entries by their logsumexp; a row must see an entry of one of them."""
    (a, log_a), (b, log_b) = one, other
    top = torch.maximum(log_a, log_b)
    weight_a, weight_b = (log_a - top).exp().unsqueeze(-1), (log_b - top).exp().unsqueeze(-1)
    total = weight_a + weight_b
    return (a.float() * weight_a + b.float() * weight_b) / total, top + total.squeeze(-1).log()


def with_sinks(part: Part, sinks: Tensor) -> Tensor:
    """Return the attention with a sink [heads] of each head among the scores: it takes weight and has no value."""
    out, log = part
    return out.float() * torch.sigmoid(log - sinks.float()).unsqueeze(-1)
