"""Attention over packed rows, registered once with transformers: rows of many sequences, each seeing its own text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from worker.engine.cpu.attention import CpuAttentionPlan
from worker.engine.errors import ModelRefused
from worker.engine.kv.dense import DenseKv
from worker.engine.paged.attention import PagedAttentionPlan
from worker.engine.segments import BoolArray, IntArray, Segment

ATTENTION_NAME = "basic_packed"
# Arguments of other attention functions that change nothing here, since the plan says what a row sees.
_HARMLESS = frozenset(
    [
        "position_ids",
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_router_logits",  # of a mixture of experts: what is returned beside the logits
        "use_cache",
        "past_key_values",
        "return_dict",
    ]
)
_PADDING_LIMIT = 1.5  # a padded group may compute at most this many times the entries it needs


@dataclass(slots=True)
class Group:
    """Segments of slots first..first+count-1, attended in one call."""

    segments: list[Segment]
    first_row: int
    queries: int = 0  # rows of the longest segment
    keys: int = 0  # KV entries of the longest segment
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)  # by sliding window

    def grown(self, segment: Segment) -> tuple[int, int]:
        """Return (queries, keys) after taking this segment in."""
        return max(self.queries, len(segment.ids)), max(self.keys, segment.end)

    def takes(self, segment: Segment) -> bool:
        """True if the segment is the next slot and padding stays small."""
        if segment.slot != self.segments[-1].slot + 1:
            return False
        queries, keys = self.grown(segment)
        needed = sum(len(s.ids) * s.end for s in (*self.segments, segment))
        return queries * keys * (len(self.segments) + 1) <= _PADDING_LIMIT * needed

    def add(self, segment: Segment) -> None:
        """Take a segment in."""
        self.queries, self.keys = self.grown(segment)
        self.segments.append(segment)

    @property
    def padded(self) -> bool:
        """True if some segment has fewer rows than the longest."""
        return any(len(s.ids) != self.queries for s in self.segments)


class DenseAttentionPlan:
    """Where the rows of one forward go and what they see. Built once a step, used by every layer."""

    def __init__(self, segments: Sequence[Segment], kv: DenseKv, query_groups: int) -> None:
        """Group `segments`, which must be in slot order, for a model with `query_groups` query heads per KV head."""
        self._kv = kv
        self._query_groups = query_groups
        self.tapped: Tensor | None = None  # [n, taps, width] outputs of tapped layers, once they have run
        device = kv.keys.device
        self._slot = torch.from_numpy(np.repeat([s.slot for s in segments], [len(s.ids) for s in segments])).to(device)
        self._index = torch.from_numpy(np.concatenate([np.arange(s.start, s.end) for s in segments])).to(device)
        self._groups = _group(segments)
        self._rows = [_padded_rows(group).to(device) if group.padded else None for group in self._groups]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Store the rows' keys and values, attend, and return [n, heads, head_dim]; inputs are [heads, n, head_dim]."""
        query = query.transpose(0, 1)  # [n, heads, head_dim]
        self._kv.write(layer, self._slot, self._index, key.transpose(0, 1), value.transpose(0, 1))
        parts = [
            self._attend_group(layer, group, rows, query, scaling, window)
            for group, rows in zip(self._groups, self._rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_group(
        self, layer: int, group: Group, rows: Tensor | None, query: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        count, first = len(group.segments), group.segments[0].slot
        heads, dim = query.shape[1:]
        total = sum(len(s.ids) for s in group.segments)
        own = query[group.first_row : group.first_row + total]
        padded = own if rows is None else own[rows]
        # Query heads of one KV head are stacked as rows, so that keys and values are read once and never repeated.
        stacked = padded.view(count, group.queries, heads // self._query_groups, self._query_groups, dim)
        stacked = stacked.permute(0, 2, 3, 1, 4).reshape(count, heads // self._query_groups, -1, dim)
        keys, values = self._kv.read(layer, slice(first, first + count), group.keys)
        mask = self._mask(group, window, query)
        out = scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=scaling)
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


def _group(segments: Sequence[Segment]) -> list[Group]:
    groups: list[Group] = []
    row = 0
    for segment in segments:
        if groups and groups[-1].takes(segment):
            groups[-1].add(segment)
        else:
            groups.append(Group([segment], row, len(segment.ids), segment.end))
        row += len(segment.ids)
    return groups


def _padded_rows(group: Group) -> Tensor:
    """Row numbers [count * queries] within the group; short segments repeat their last row."""
    rows, base = [], 0
    for s in group.segments:
        rows.append(base + np.minimum(np.arange(group.queries), len(s.ids) - 1))
        base += len(s.ids)
    return torch.from_numpy(np.concatenate(rows))


def _unpadded(group: Group) -> Tensor:
    """Places of the real rows in the padded output."""
    return torch.from_numpy(
        np.concatenate([i * group.queries + np.arange(len(s.ids)) for i, s in enumerate(group.segments)])
    )


def _visibility(group: Group, window: int | None) -> BoolArray:
    """Return [count, queries, keys]: what each row of each segment sees; padding rows see the prefix alone."""
    seen = np.zeros((len(group.segments), group.queries, group.keys), np.bool_)
    for i, s in enumerate(group.segments):
        seen[i, :, : max(s.prefix, 1)] = True  # at least one entry, so that no row of padding is empty
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
    """Positions of the KV entries 0..end-1; earlier tree rows lie at the depth their visibility says."""
    if s.visible is None:
        return np.arange(s.end)
    # A row sees exactly its ancestors and itself, so the depth of a row of this segment is the number it sees.
    # Rows of earlier segments (start > prefix) are ancestors only; their depth is how many rows they stand above.
    earlier = s.start - s.prefix
    positions = np.arange(s.end)
    positions[s.start :] = s.positions
    if earlier:
        positions[s.prefix : s.start] = _earlier_positions(s, earlier)
    return positions


def _earlier_positions(s: Segment, earlier: int) -> IntArray:
    assert s.visible is not None
    columns = s.visible[:, :earlier]
    rank = columns.cumsum(axis=1) - 1 + s.prefix  # ancestors are stored in order of depth
    # An entry that no row sees has no position that matters.
    return np.where(columns.any(axis=0), np.where(columns, rank, 0).max(axis=0), 0)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: DenseAttentionPlan | CpuAttentionPlan | PagedAttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend the packed rows [1, heads, n, head_dim] of one layer; the signature is transformers'.

    Raises ModelRefused for an argument that would change the result and is not implemented (softcap, sinks, …).
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown or attention_mask is not None:
        raise ModelRefused(
            f"{type(module).__name__} passes {', '.join(unknown) or 'a mask'} to attention, "
            "which packed decoding does not implement; choose another model"
        )
    if plan is None:
        raise ModelRefused(
            f"{type(module).__name__} does not hand on what its rows see, which packed decoding needs; "
            "choose another model"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = plan.attend(int(module.layer_idx), query[0], key[0], value[0], scale, sliding_window)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
