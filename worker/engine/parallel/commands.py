"""Commands from the leader of a tensor parallel replica to the followers, encoded as one int64 array.

They hold token ids, positions and masks, never probabilities: followers run the rows that the leader chose and decide
nothing, so ranks can't disagree about a draft tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from worker.engine.segments import BoolArray, IntArray, KvMove, Segment


class CommandKind(IntEnum):
    """What a follower must do."""

    FORWARD = 0
    COMPACT = 1
    COPY_PREFIX = 2
    BUILD = 3  # create the KV slots of a loaded model
    FREE_MEMORY = 4  # report the free memory
    END = 5
    TRUNCATE = 6
    CLEAR = 7
    PREPARE = 8


@dataclass(frozen=True, slots=True)
class RankCommand:
    """One command; its kind decides which fields are set."""

    kind: CommandKind
    model: int = 0
    segments: tuple[Segment, ...] = ()
    moves: tuple[KvMove, ...] = ()
    numbers: tuple[int, ...] = ()

    def encode(self) -> IntArray:
        """Return the command as an array."""
        parts: list[IntArray] = [_ints(self.kind, self.model, len(self.segments), len(self.moves), len(self.numbers))]
        parts += [part for segment in self.segments for part in _segment(segment)]
        parts += [part for move in self.moves for part in _move(move)]
        parts.append(_ints(*self.numbers))
        return np.concatenate(parts)


def decode(words: IntArray) -> RankCommand:
    """Return the command in an array."""
    reader = _ArrayReader(words)
    kind, model, segments, moves, numbers = reader.ints(5)
    return RankCommand(
        kind=CommandKind(kind),
        model=model,
        segments=tuple(_read_segment(reader) for _ in range(segments)),
        moves=tuple(_read_move(reader) for _ in range(moves)),
        numbers=tuple(reader.ints(numbers)),
    )


class _ArrayReader:
    """Takes the fields of a command from its array, in the order in which `encode` wrote them."""

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
    bits = None if segment.visible is None else _pack_bits(segment.visible)
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


def _read_segment(reader: _ArrayReader) -> Segment:
    slot, prefix, start, rows, kept, bits = reader.ints(6)
    ids, positions, keep = (reader.array(count) for count in (rows, rows, kept))
    shape = (rows, start - prefix + rows)
    visible = None if bits < 0 else _unpack_bits(reader.array(bits), shape)
    return Segment(slot, prefix, start, ids, positions, visible, keep)


def _move(move: KvMove) -> Sequence[IntArray]:
    return _ints(move.slot, move.destination, len(move.sources)), move.sources


def _read_move(reader: _ArrayReader) -> KvMove:
    slot, destination, count = reader.ints(3)
    return KvMove(slot, destination, reader.array(count))


def _pack_bits(seen: BoolArray) -> IntArray:
    octets = np.packbits(seen)
    return np.pad(octets, (0, -len(octets) % 8)).view(np.int64)


def _unpack_bits(bits: IntArray, shape: tuple[int, int]) -> BoolArray:
    return np.unpackbits(bits.view(np.uint8), count=shape[0] * shape[1]).astype(np.bool_).reshape(shape)
