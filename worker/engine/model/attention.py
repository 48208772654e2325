"""Attention over packed rows, registered with transformers: each row of a forward sees its own sequence only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from worker.engine.attention_options import AttentionOptions
from worker.engine.errors import ModelRefused
from worker.engine.kv.dense import DenseKv
from worker.engine.model.latent import LATENT, LatentHeads
from worker.engine.segments import BoolArray, IntArray, Segment

ATTENTION_NAME = "basic_packed"
# Arguments of transformers' attention functions that are ignored here: the plan decides what a row sees.
_HARMLESS = frozenset(
    [
        "position_ids",
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_router_logits",  # mixture of experts: returned beside the logits
        "use_cache",
        "past_key_values",
        "return_dict",
    ]
)
# Attributes of attention modules, set at load. KV_SHAPE: KV heads and the size of each in the KV layout, where that of
# this layer differs. WINDOW_OF_CONFIG: the layer has the sliding window of its configuration and does not pass it.
KV_SHAPE, WINDOW_OF_CONFIG = "basic_kv_shape", "basic_window_of_config"
# The plan of the forward in progress, for models that do not pass their arguments on to attention.
_PLAN: ContextVar[AttentionPlan | None] = ContextVar("attention_plan", default=None)
_PADDING_LIMIT = 1.5  # a padded group computes at most this many times the (row, entry) pairs that it needs


class AttentionPlan(Protocol):
    """Where the rows of one forward are stored and what they see. Built once per step, used by every layer."""

    tapped: Tensor | None  # [n, taps, width] outputs of the tapped layers, after they have run

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Store the rows' keys and values, attend, and return [n, heads, head_dim]; inputs are [heads, n, head_dim]."""


@dataclass(slots=True)
class Group:
    """Segments of consecutive slots, padded to one shape and attended in one call."""

    segments: list[Segment]
    first_row: int
    queries: int = 0  # rows of the longest segment
    keys: int = 0  # KV entries of the longest segment
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)  # by sliding window

    def grown(self, segment: Segment) -> tuple[int, int]:
        """Return (queries, keys) of the group with this segment added."""
        return max(self.queries, len(segment.ids)), max(self.keys, segment.end)

    def accepts(self, segment: Segment) -> bool:
        """Return whether the segment is in the next slot and padding stays below the limit."""
        if segment.slot != self.segments[-1].slot + 1:
            return False
        queries, keys = self.grown(segment)
        needed = sum(len(s.ids) * s.end for s in (*self.segments, segment))
        return queries * keys * (len(self.segments) + 1) <= _PADDING_LIMIT * needed

    def add(self, segment: Segment) -> None:
        """Add a segment that the group accepts."""
        self.queries, self.keys = self.grown(segment)
        self.segments.append(segment)

    @property
    def padded(self) -> bool:
        """Whether some segment has fewer rows than the longest."""
        return any(len(s.ids) != self.queries for s in self.segments)


class DenseAttentionPlan:
    """Attention over `DenseKv` with torch: segments of consecutive slots are padded to a group."""

    def __init__(self, segments: Sequence[Segment], kv: DenseKv, query_groups: int) -> None:
        """Group `segments`, which must be in slot order, for a model with `query_groups` query heads per KV head."""
        self._kv = kv
        self._query_groups = query_groups
        self.tapped: Tensor | None = None  # [n, taps, width]
        device = kv.keys.device
        self._slot = torch.from_numpy(np.repeat([s.slot for s in segments], [len(s.ids) for s in segments])).to(device)
        self._index = torch.from_numpy(np.concatenate([np.arange(s.start, s.end) for s in segments])).to(device)
        self._groups = _group(segments)
        self._rows = [_padded_rows(group).to(device) if group.padded else None for group in self._groups]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Store the rows' keys and values, attend, and return [n, heads, head_dim]; inputs are [heads, n, head_dim]."""
        query = query.transpose(0, 1)  # [n, heads, head_dim]
        self._kv.write(layer, self._slot, self._index, key.transpose(0, 1), value.transpose(0, 1))
        parts = [
            self._attend_group(layer, group, rows, query, options)
            for group, rows in zip(self._groups, self._rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_group(
        self, layer: int, group: Group, rows: Tensor | None, query: Tensor, options: AttentionOptions
    ) -> Tensor:
        count, first = len(group.segments), group.segments[0].slot
        heads, dim = query.shape[1:]
        total = sum(len(s.ids) for s in group.segments)
        own = query[group.first_row : group.first_row + total]
        padded = own if rows is None else own[rows]
        # Stack the query heads of a KV head as rows: keys and values are then read once and never repeated.
        stacked = padded.view(count, group.queries, heads // self._query_groups, self._query_groups, dim)
        stacked = stacked.permute(0, 2, 3, 1, 4).reshape(count, heads // self._query_groups, -1, dim)
        keys, values = self._kv.read(layer, slice(first, first + count), group.keys)
        mask = self._mask(group, options.window, query)
        if options.softcap is None and options.sinks is None:
            out = scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=options.scaling)
        else:
            out = _attended(stacked, keys, values, mask, options)
        out = out.view(count, heads // self._query_groups, self._query_groups, group.queries, dim)
        out = out.permute(0, 3, 1, 2, 4).reshape(count * group.queries, heads, dim)
        return out if rows is None else out[_unpadded(group).to(out.device)]

    def _mask(self, group: Group, window: int | None, like: Tensor) -> Tensor | None:
        if window not in group.masks:
            seen = _visibility(group, window)
            mask = None
            if not seen.all():
                bias = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~torch.from_numpy(seen), -torch.inf)
                mask = bias.repeat(1, self._query_groups, 1).unsqueeze(1).to(like.device)
            group.masks[window] = mask
        return group.masks[window]


def _attended(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: AttentionOptions) -> Tensor:
    """Attend `query` [count, kv_heads, rows of each head, dim] with softcap or sinks, which torch's attention lacks."""
    scores = (query @ keys.transpose(-1, -2)).float() * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores + mask
    if options.sinks is None:
        return scores.softmax(-1).to(values.dtype) @ values
    count, kv_heads, rows = query.shape[:3]
    sinks = options.sinks.float().view(1, kv_heads, -1, 1)
    sinks = sinks.repeat_interleave(rows // sinks.shape[2], 2).expand(count, -1, -1, -1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values


def _group(segments: Sequence[Segment]) -> list[Group]:
    groups: list[Group] = []
    row = 0
    for segment in segments:
        if groups and groups[-1].accepts(segment):
            groups[-1].add(segment)
        else:
            groups.append(Group([segment], row, len(segment.ids), segment.end))
        row += len(segment.ids)
    return groups


def _padded_rows(group: Group) -> Tensor:
    """Return row indices [count * queries] within the group; short segments repeat their last row."""
    rows, base = [], 0
    for s in group.segments:
        rows.append(base + np.minimum(np.arange(group.queries), len(s.ids) - 1))
        base += len(s.ids)
    return torch.from_numpy(np.concatenate(rows))


def _unpadded(group: Group) -> Tensor:
    """Return the indices of the real rows in the padded output."""
    return torch.from_numpy(
        np.concatenate([i * group.queries + np.arange(len(s.ids)) for i, s in enumerate(group.segments)])
    )


def _visibility(group: Group, window: int | None) -> BoolArray:
    """Return [count, queries, keys]: what each row of each segment sees; padding rows see the prefix only."""
    seen = np.zeros((len(group.segments), group.queries, group.keys), np.bool_)
    for i, s in enumerate(group.segments):
        seen[i, :, : max(s.prefix, 1)] = True  # at least one entry: softmax over none is NaN
        seen[i, : len(s.ids), : s.end] = _segment_visibility(s, window)
    return seen


def _segment_visibility(s: Segment, window: int | None) -> BoolArray:
    n = len(s.ids)
    own = np.tri(n, dtype=np.bool_) if s.visible is None else s.visible
    seen = np.concatenate([np.ones((n, s.prefix), np.bool_), own], axis=1)
    if window is not None:
        seen &= s.positions[:, None] - _key_positions(s)[None, :] < window
    return seen


def _key_positions(s: Segment) -> IntArray:
    """Return the text positions of KV entries 0..end-1."""
    if s.visible is None:
        return np.arange(s.end)
    # Tree rows that an earlier forward stored (entries prefix..start-1) have no positions in this segment.
    earlier = s.start - s.prefix
    positions = np.arange(s.end)
    positions[s.start :] = s.positions
    if earlier:
        positions[s.prefix : s.start] = _earlier_positions(s, earlier)
    return positions


def _earlier_positions(s: Segment, earlier: int) -> IntArray:
    assert s.visible is not None
    columns = s.visible[:, :earlier]
    rank = columns.cumsum(axis=1) - 1 + s.prefix  # ancestors are stored in order of depth: their rank is their depth
    # The position of an entry that no row sees does not matter.
    return np.where(columns.any(axis=0), np.where(columns, rank, 0).max(axis=0), 0)


@contextmanager
def attending(plan: AttentionPlan) -> Iterator[None]:
    """Attend by a plan while a model's forward runs."""
    before = _PLAN.set(plan)
    try:
        yield
    finally:
        _PLAN.reset(before)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend the packed rows [1, heads, n, head_dim] of one layer; the signature is transformers', `s_aux` are sinks.

    Layers with latents attend over these, with absorbed products. Where keys and values differ in size, or from layer
    to layer, the smaller are padded with zeros, which changes no sum; where the number of KV heads differs, they are
    repeated.

    Raises ModelRefused for an argument that would change the result and is not implemented.
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown or attention_mask is not None:
        raise ModelRefused(
            f"{type(module).__name__} passes {', '.join(unknown) or 'a mask'} to attention, "
            "which packed decoding does not implement; choose another model"
        )
    plan = plan or _PLAN.get()
    if plan is None:
        raise ModelRefused(f"{type(module).__name__} calls attention outside of a packed forward; choose another model")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is None and getattr(module, WINDOW_OF_CONFIG, False):
        sliding_window = module.config.sliding_window  # type: ignore[assignment, union-attr]
    options = AttentionOptions(scale, sliding_window, softcap, s_aux)
    latent: LatentHeads | None = getattr(module, LATENT, None)
    if latent is not None:
        query = latent.absorbed(query[0]).unsqueeze(0)
    size = value.shape[-1]
    kv_heads, width = getattr(module, KV_SHAPE, None) or (key.shape[1], max(size, key.shape[-1]))
    query, key, value = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    if key.shape[1] != kv_heads:
        key, value = (x.repeat_interleave(kv_heads // x.shape[1], 1) for x in (key, value))
    out = plan.attend(int(module.layer_idx), query[0], key[0], value[0], options)  # type: ignore[arg-type]
    return (out[..., :size] if latent is None else latent.values(out)).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
