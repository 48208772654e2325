"""Packed rows: the tokens of many sequences, as one ragged forward takes them.

A segment is what one sequence contributes to a forward: a stretch of its prompt (a chain), or nodes of its draft tree.
Every row sees the committed prefix of its sequence; beyond that, a chain row sees the rows before it, and a tree row
its ancestors. Rows take their depth as position, so keys never need another rotation when an accepted path moves.
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
    prefix: int  # committed tokens in the slot: every row sees them
    start: int  # KV index of the first row; the rows take start, start + 1, …
    ids: IntArray  # [n] token ids
    positions: IntArray  # [n] positions in the text
    visible: BoolArray | None  # [n, start - prefix + n] which entries from `prefix` on a row sees; None: a causal chain
    keep: IntArray  # [k] rows whose logits are wanted

    @property
    def end(self) -> int:
        """KV index behind the last row."""
        return self.start + len(self.ids)


def chain(slot: int, cached: int, ids: list[int], *, keep_last: bool) -> Segment:
    """Return a segment of consecutive tokens behind `cached` committed ones."""
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
    """Return which rows of a forward over `segments` are kept, int64."""
    return torch.from_numpy(kept_row_indices(segments))


def kept_row_indices(segments: Sequence[Segment]) -> IntArray:
    """Return the same as an array."""
    if len(segments) == 1:
        return segments[0].keep
    firsts = accumulate((len(s.ids) for s in segments[:-1]), initial=0)
    places: IntArray = np.concatenate([s.keep for s in segments])
    return places + np.repeat(np.fromiter(firsts, np.int64), [len(s.keep) for s in segments])


def concatenated(parts: Sequence[IntArray]) -> IntArray:
    """Return the parts one behind the other, in one piece; a single part as it is."""
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class KvMove:
    """KV entries of one slot to bring down to consecutive places: `sources[i]` goes to `destination + i`."""

    slot: int
    destination: int
    sources: IntArray  # [n], ascending, sources[i] >= destination + i

    @property
    def in_place(self) -> bool:
        """True if every entry lies where it belongs."""
        return not len(self.sources) or int(self.sources[-1]) == self.destination + len(self.sources) - 1


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """The first `length` KV entries of one slot, to be had in another: two texts begin alike.

    Where both are the same slot, its next text begins as the one that has ended there, whose rest is of no more use.
    """

    source: int
    target: int
    length: int
