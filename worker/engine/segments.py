"""Packed rows: the tokens of many sequences as input of one ragged forward.

A segment is one sequence's part of a forward: a piece of its prompt (a chain), or nodes of its draft tree. Every row
attends to the committed prefix of its sequence. In addition a chain row attends to the rows before it, and a tree row
to its ancestors (tree attention). The position of a tree row is that of its depth, so an accepted path can be moved in
the KV cache without rotating its keys again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one sequence in a forward."""

    slot: int  # KV slot of the sequence
    prefix: int  # committed tokens in the slot: every row attends to them
    start: int  # KV index of the first row; the rows take start, start + 1, …
    ids: IntArray  # [n] token ids
    positions: IntArray  # [n] positions in the sequence
    visible: BoolArray | None  # [n, start - prefix + n] attention mask of the entries from `prefix` on; None: causal
    keep: IntArray  # [k] rows whose logits are computed

    @property
    def end(self) -> int:
        """KV index after the last row."""
        return self.start + len(self.ids)


def chain(slot: int, cached: int, ids: list[int], *, keep_last: bool) -> Segment:
    """Return a segment of consecutive tokens after `cached` committed ones; only the last one's logits may be kept."""
    n = len(ids)
    return Segment(
        slot=slot,
        prefix=cached,
        start=cached,
        ids=np.asarray(ids, np.int64),
        positions=np.arange(cached, cached + n),
        visible=None,
        keep=np.array([n - 1] if keep_last else [], np.int64),
    )


def kept_rows(segments: Sequence[Segment]) -> Tensor:
    """Return the packed rows of a forward over `segments` whose logits are computed, as an int64 tensor."""
    return torch.from_numpy(kept_row_indices(segments))


def kept_row_indices(segments: Sequence[Segment]) -> IntArray:
    """Return the packed rows of a forward over `segments` whose logits are computed."""
    if len(segments) == 1:
        return segments[0].keep
    firsts = accumulate((len(s.ids) for s in segments[:-1]), initial=0)
    rows: IntArray = np.concatenate([s.keep for s in segments])
    return rows + np.repeat(np.fromiter(firsts, np.int64), [len(s.keep) for s in segments])


def concatenated(parts: Sequence[IntArray]) -> IntArray:
    """Return the concatenation of the parts, contiguous; a single part is not copied if it is contiguous."""
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class KvMove:
    """Compaction in one slot: KV entry `sources[i]` moves down to `destination + i`."""

    slot: int
    destination: int
    sources: IntArray  # [n], ascending, sources[i] >= destination + i

    @property
    def in_place(self) -> bool:
        """True if no entry has to move."""
        return not len(self.sources) or int(self.sources[-1]) == self.destination + len(self.sources) - 1


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """Copy the first `length` KV entries of one slot to another: two sequences share a prefix.

    If both are the same slot, a finished sequence has left the prefix there, and the entries after it are dropped.
    """

    source: int
    target: int
    length: int
