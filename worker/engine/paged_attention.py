"""Attention over paged KV: the shared stretch of every sequence in one call, listed entries beside it, merged.

language_model -> attention -> [paged_attention] -> paged_rows, paged_kv. Both parts return the log of their sum of
exponentials, so that their merge is the softmax over all entries. In half precision on a GPU torch's own
`varlen_attn` reads the stretch from the blocks where they lie; it is unmeasured. Everywhere else, and where it can't
say what a row sees (a sliding window over the rows of a tree), the stretch is gathered by the block table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from worker.engine.paged_kv import PagedKv
from worker.engine.paged_rows import PagedRows, exact_shape, laid_out, on_device
from worker.engine.rows import Segment

FLASH_BLOCK = 256  # entries: what the flash kernel in torch asks of a block
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_HEAD_DIM = 256  # at most, and a multiple of 8
_GATHERED_ROWS = 64  # rows whose stretches are gathered together: bounds the memory of a long prompt

Part = tuple[Tensor, Tensor]  # outputs [n, heads, head_dim], and float32 logs of the sums of exponentials [n, heads]


class PagedPlan:
    """Where the rows of one forward go and what they see. Used by every layer."""

    def __init__(self, rows: PagedRows, kv: PagedKv) -> None:
        """Attend `rows` in `kv`, whose blocks they own already."""
        self._rows, self._kv = rows, kv
        self.tapped: Tensor | None = None  # [n, taps, width] outputs of tapped layers, once they have run
        # What the flash kernel wants of the numbers, made once for all layers.
        self._starts, self._lengths, self._table = (x.to(torch.int32) for x in (rows.starts, rows.lengths, rows.table))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Store the rows' keys and values, attend, and return [n, heads, head_dim]; inputs are [heads, n, head_dim]."""
        self._kv.write(layer, self._rows.places, key.transpose(0, 1), value.transpose(0, 1))
        query = query.transpose(0, 1).contiguous()
        stretch = self._flash if self._takes_flash(query, window) else self._gathered
        part = stretch(layer, query, scaling, window)
        if not self._rows.shape.listed:
            return part[0]
        return merged(part, self._listed(layer, query, scaling, window)).to(query.dtype)

    def _takes_flash(self, query: Tensor, window: int | None) -> bool:
        """True if the flash kernel can: its windows go by places, which are no positions in trees."""
        fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= _FLASH_HEAD_DIM and not self._kv.block_size % FLASH_BLOCK
        return query.is_cuda and query.dtype in _FLASH_DTYPES and fits and not (window and self._rows.shape.listed)

    def _flash(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Part:
        """Attend the stretches where they lie. Unmeasured."""
        shape, keys, values = self._rows.shape, self._kv.keys[layer], self._kv.values[layer]
        n, heads, dim = query.shape
        kv_heads = keys.shape[2]
        group = heads // kv_heads
        single = shape.queries == 1 or not shape.causal  # all rows of a run see the same stretch
        fused = single and window is None
        if fused:
            # Query heads of one KV head are rows of their own, so that its keys and values are read once.
            query = query.view(n, kv_heads, group, dim).transpose(1, 2).reshape(n * group, kv_heads, dim)
        times = group if fused else 1
        out, lse = varlen_attn(
            query,
            keys,
            values,
            self._starts * times,
            None,
            shape.queries * times,
            shape.blocks * self._kv.block_size,
            return_aux=AuxRequest(lse=True),
            scale=scaling,
            window_size=(-1, -1) if fused else (-1 if window is None else window - 1, 0),
            enable_gqa=not fused and group > 1,
            seqused_k=self._lengths,
            block_table=self._table,
            # One split: a row adds up in the same order whatever else is in the batch. (More than one is also wrong for
            # packed rows in the flash kernel of torch 2.13.)
            num_splits=1,
        )
        lse = lse.transpose(0, 1)  # the kernel returns [heads, rows]
        if fused:
            out = out.view(n, group, kv_heads, dim).transpose(1, 2).reshape(n, heads, dim)
            lse = lse.view(n, group, kv_heads).transpose(1, 2).reshape(n, heads)
        return out, lse.masked_fill((self._rows.seen == 0).unsqueeze(1), -torch.inf)  # of nothing it says +inf

    def _gathered(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Part:
        """Attend the stretches row by row, from copies."""
        slices = range(0, len(query), _GATHERED_ROWS)
        parts = [self._gather(layer, query, scaling, window, slice(at, at + _GATHERED_ROWS)) for at in slices]
        outs, logs = zip(*parts, strict=True)
        return torch.cat(outs).to(query.dtype), torch.cat(logs)

    def _gather(self, layer: int, query: Tensor, scaling: float, window: int | None, some: slice) -> Part:
        rows, size = self._rows, self._kv.block_size
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
        keys, values = (store[layer][held].flatten(1, 2) for store in (self._kv.keys, self._kv.values))
        return attended(query[some], keys, values, visible, scaling)

    def _listed(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Part:
        """Attend the entries that each row lists: its ancestors in order of depth, and itself."""
        rows = self._rows
        rank = torch.arange(rows.shape.listed, device=query.device)
        visible = rank < rows.own_count.unsqueeze(1)
        if window is not None:  # the entries of a row end at its own position and go up one by one
            visible &= rows.own_count.unsqueeze(1) - 1 - rank < window
        keys, values = (store[layer].flatten(0, 1)[rows.own] for store in (self._kv.keys, self._kv.values))
        return attended(query, keys, values, visible, scaling)


def paged_plan(segments: Sequence[Segment], kv: PagedKv) -> PagedPlan:
    """Return the plan of a forward over `segments` in its exact shape."""
    reserve(segments, kv)
    shape = exact_shape(segments, kv)
    return PagedPlan(PagedRows(shape, on_device(laid_out(segments, kv, shape), kv.keys.device)), kv)


def reserve(segments: Sequence[Segment], kv: PagedKv) -> None:
    """Give every segment the blocks that its rows are written to."""
    for s in segments:
        if s.visible is None:
            kv.release(s.slot, s.end)  # behind a stretch of text there is nothing: what lies there is an older one
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
