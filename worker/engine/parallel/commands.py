"""Orders from the first rank of a replica to the others: what to run, as one array of whole numbers.

Only ids, places and masks travel. No probability does, so that ranks can't come to differ about a tree: whoever follows
sees the rows that the first rank decided on, and nothing to decide from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from worker.engine.segments import BoolArray, IntArray, KvMove, Segment


class CommandKind(IntEnum):
    """What a rank is to do."""

    FORWARD = 0
    COMPACT = 1
    COPY_PREFIX = 2
    BUILD = 3  # KV slots for a loaded model
    FREE_MEMORY = 4  # say how much memory is free
    END = 5
    TRUNCATE = 6
    CLEAR = 7
    PREPARE = 8


@dataclass(frozen=True, slots=True)
class RankCommand:
    """One order; which of the fields are filled in depends on the operation."""

    kind: CommandKind
    model: int = 0
    segments: tuple[Segment, ...] = ()
    moves: tuple[KvMove, ...] = ()
    numbers: tuple[int, ...] = ()

    def encode(self) -> IntArray:
        """Return the order as it travels."""
        parts: list[IntArray] = [_ints(self.kind, self.model, len(self.segments), len(self.moves), len(self.numbers))]
        parts += [part for segment in self.segments for part in _segment(segment)]
        parts += [part for move in self.moves for part in _move(move)]
        parts.append(_ints(*self.numbers))
        return np.concatenate(parts)


def decode(words: IntArray) -> RankCommand:
    """Return the order that travelled."""
    reader = _Reader(words)
    kind, model, segments, moves, numbers = reader.ints(5)
    return RankCommand(
        kind=CommandKind(kind),
        model=model,
        segments=tuple(_read_segment(reader) for _ in range(segments)),
        moves=tuple(_read_move(reader) for _ in range(moves)),
        numbers=tuple(reader.ints(numbers)),
    )


class _Reader:
    """Takes an array from its front."""

    def __init__(self, words: IntArray) -> None:
        self._words, self._at = words, 0

    def array(self, count: int) -> IntArray:
        self._at += count
        return self._words[self._at - count : self._at]

    def ints(self, count: int) -> list[int]:
        return [int(number) for number in self.array(count)]


def _ints(*numbers: int) -> IntArray:
    return np.array(numbers, np.int64)


def _segment(segment: Segment) -> Sequence[IntArray]:
    bits = None if segment.visible is None else _packed(segment.visible)
    return (
        _ints(
            segment.slot,
            segment.prefix,
            segment.start,
            len(segment.ids),
            len(segment.keep),
            -1 if bits is None else len(bits),
        ),
        segment.ids,
        segment.positions,
        segment.keep,
        _ints() if bits is None else bits,
    )


def _read_segment(reader: _Reader) -> Segment:
    slot, prefix, start, rows, kept, bits = reader.ints(6)
    ids, positions, keep = (reader.array(count) for count in (rows, rows, kept))
    shape = (rows, start - prefix + rows)
    visible = None if bits < 0 else _unpacked(reader.array(bits), shape)
    return Segment(slot, prefix, start, ids, positions, visible, keep)


def _move(move: KvMove) -> Sequence[IntArray]:
    return _ints(move.slot, move.destination, len(move.sources)), move.sources


def _read_move(reader: _Reader) -> KvMove:
    slot, destination, count = reader.ints(3)
    return KvMove(slot, destination, reader.array(count))


def _packed(seen: BoolArray) -> IntArray:
    octets = np.packbits(seen)
    return np.pad(octets, (0, -len(octets) % 8)).view(np.int64)


def _unpacked(bits: IntArray, shape: tuple[int, int]) -> BoolArray:
    return np.unpackbits(bits.view(np.uint8), count=shape[0] * shape[1]).astype(np.bool_).reshape(shape)
