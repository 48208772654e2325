"""Packed rows: the tokens of many sequences as input of one ragged forward.

A segment is one sequence's part of a forward: a piece of its prompt (a chain), or nodes of its draft tree. Every row
attends to the committed prefix of its sequence. In addition a chain row attends to the rows before it, and a tree row
to its ancestors (tree attention). The position of a tree row is that of its depth, so an accepted path can be moved in
the KV cache without rotating its keys again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
TokenIds: TypeAlias = "array[int]"  # 32-bit numbers: cheap to cut, to compare and to send
_Number = TypeVar("_Number", np.int64, np.bool_)


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


def chain(slot: int, cached: int, ids: Sequence[int], *, keep_last: bool, position: int | None = None) -> Segment:
    """Return a segment of consecutive tokens after `cached` committed ones; only the last one's logits may be kept.

    `position` is that of the first token, by default `cached`.
    """
    n, first = len(ids), cached if position is None else position
    return Segment(
        slot=slot,
        prefix=cached,
        start=cached,
        ids=np.array(ids, np.int64),
        positions=np.arange(first, first + n),
        visible=None,
        keep=np.array([n - 1] if keep_last else [], np.int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Segments(Sequence[Segment]):
    """The segments of one forward as arrays. Iterate for one at a time, which is slower."""

    slots: IntArray  # [segments]
    prefixes: IntArray  # [segments]
    starts: IntArray  # [segments]
    counts: IntArray  # [segments] rows
    chains: BoolArray  # [segments] True: causal
    ids: IntArray  # [rows]
    positions: IntArray  # [rows]
    kept: IntArray  # [kept] rows whose logits are computed, ascending
    kept_counts: IntArray  # [segments]
    visible_counts: IntArray  # [rows] entries from `prefix` on that a row sees; 0 for causal rows
    visible: IntArray  # [sum of visible_counts] these entries, 0 being `prefix`; ascending for each row

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Segments:
        """Return the segments as arrays."""
        if isinstance(segments, Segments):
            return segments
        numbers = [(s.slot, s.prefix, s.start, len(s.ids), len(s.keep), int(s.visible is None)) for s in segments]
        slots, prefixes, starts, counts, kept_counts, chains = np.array(numbers, np.int64).reshape(-1, 6).T
        masks = [s.visible for s in segments]
        visible = [np.nonzero(mask)[1] for mask in masks if mask is not None]
        return cls(
            slots=slots,
            prefixes=prefixes,
            starts=starts,
            counts=counts,
            chains=chains.astype(np.bool_),
            ids=_joined([s.ids for s in segments]),
            positions=_joined([s.positions for s in segments]),
            kept=_joined([s.keep for s in segments]) + np.repeat(_firsts(counts), kept_counts),
            kept_counts=kept_counts,
            visible_counts=_joined(
                [
                    np.zeros(len(s.ids), np.int64) if mask is None else mask.sum(axis=1)
                    for s, mask in zip(segments, masks, strict=True)
                ]
            ),
            visible=_joined(visible),
        )

    @classmethod
    def joined(cls, one: Segments, other: Segments) -> Segments:
        """Return the segments of both."""
        columns = {
            field.name: np.concatenate([getattr(one, field.name), getattr(other, field.name)]) for field in fields(cls)
        }
        columns["kept"][len(one.kept) :] += one.num_rows
        return cls(**columns)

    def ordered(self, order: IntArray) -> Segments:
        """Return the segments in another order."""
        rows = ranges(self.firsts[order], self.counts[order])
        kept = self.kept_in(order)
        visible = ranges(_firsts(self.visible_counts)[rows], self.visible_counts[rows])
        moved = np.empty(self.num_rows, np.int64)
        moved[rows] = np.arange(self.num_rows)
        return Segments(
            slots=self.slots[order],
            prefixes=self.prefixes[order],
            starts=self.starts[order],
            counts=self.counts[order],
            chains=self.chains[order],
            ids=self.ids[rows],
            positions=self.positions[rows],
            kept=moved[self.kept[kept]],
            kept_counts=self.kept_counts[order],
            visible_counts=self.visible_counts[rows],
            visible=self.visible[visible],
        )

    def kept_in(self, order: IntArray) -> IntArray:
        """Return the indices into `kept` of each segment's kept rows, segments in this order."""
        return ranges(_firsts(self.kept_counts)[order], self.kept_counts[order])

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.ids)

    @property
    def firsts(self) -> IntArray:
        """First row of each segment [segments]."""
        return _firsts(self.counts)

    @property
    def ends(self) -> IntArray:
        """KV index after the last row of each segment [segments]."""
        return self.starts + self.counts

    @property
    def entries(self) -> IntArray:
        """KV index of each row [rows]."""
        return ranges(self.starts, self.counts)

    def per_row(self, column: NDArray[_Number]) -> NDArray[_Number]:
        """Return the entry of its segment for each row [rows], from a column [segments]."""
        return np.repeat(column, self.counts)

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self.slots)

    def __iter__(self) -> Iterator[Segment]:
        """Yield one segment at a time."""
        visible_firsts = np.append(_firsts(self.visible_counts), len(self.visible))
        columns = (self.slots, self.prefixes, self.starts, self.chains, self.counts, self.firsts, self.kept_counts)
        rows = zip(*(column.tolist() for column in (*columns, _firsts(self.kept_counts))), strict=True)
        for slot, prefix, start, is_chain, count, first, kept_count, kept in rows:
            mask: BoolArray | None = None
            if not is_chain:
                mask = np.zeros((count, start - prefix + count), np.bool_)
                visible = slice(int(visible_firsts[first]), int(visible_firsts[first + count]))
                mask[np.repeat(np.arange(count), self.visible_counts[first : first + count]), self.visible[visible]] = (
                    True
                )
            yield Segment(
                slot=slot,
                prefix=prefix,
                start=start,
                ids=self.ids[first : first + count],
                positions=self.positions[first : first + count],
                visible=mask,
                keep=self.kept[kept : kept + kept_count] - first,
            )

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Segment]: ...

    def __getitem__(self, index: int | slice) -> Segment | Sequence[Segment]:
        """Return one segment, or several."""
        return list(self)[index]


def ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """Return `counts[i]` consecutive numbers from `starts[i]` on, for each i: [sum of counts]."""
    numbers: IntArray = np.arange(int(counts.sum())) + np.repeat(starts - _firsts(counts), counts)
    return numbers


def _firsts(counts: IntArray) -> IntArray:
    """Return the index of the first of `counts[i]` consecutive items, for each i."""
    return counts.cumsum() - counts


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, np.int64), *parts])


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


@dataclass(frozen=True, slots=True, eq=False)
class KvMoves(Sequence[KvMove]):
    """Compaction in several slots, as arrays. No move is in place."""

    slots: IntArray  # [moves]
    destinations: IntArray  # [moves]
    counts: IntArray  # [moves] entries
    sources: IntArray  # [entries]

    @classmethod
    def of(cls, moves: Sequence[KvMove]) -> KvMoves:
        """Return those of the moves that are not in place."""
        if isinstance(moves, KvMoves):
            return moves
        some = [move for move in moves if not move.in_place]
        numbers = [(m.slot, m.destination, len(m.sources)) for m in some]
        slots, destinations, counts = np.array(numbers, np.int64).reshape(-1, 3).T
        return cls(slots, destinations, counts, _joined([move.sources for move in some]))

    @property
    def entry_slots(self) -> IntArray:
        """Slot of each entry [entries]."""
        return np.repeat(self.slots, self.counts)

    @property
    def targets(self) -> IntArray:
        """KV index that each entry moves to [entries]."""
        return ranges(self.destinations, self.counts)

    def __len__(self) -> int:
        """Return the number of moves."""
        return len(self.slots)

    def __iter__(self) -> Iterator[KvMove]:
        """Yield one move at a time."""
        columns = (self.slots, self.destinations, _firsts(self.counts), self.counts)
        for slot, destination, first, count in zip(*(column.tolist() for column in columns), strict=True):
            yield KvMove(slot, destination, self.sources[first : first + count])

    @overload
    def __getitem__(self, index: int) -> KvMove: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[KvMove]: ...

    def __getitem__(self, index: int | slice) -> KvMove | Sequence[KvMove]:
        """Return one move, or several."""
        return list(self)[index]


class PrefixCopy(NamedTuple):
    """Copy the first `length` KV entries of one slot to another: two sequences share a prefix."""

    source: int
    target: int
    length: int
