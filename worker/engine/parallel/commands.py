"""Commands from the leader of a tensor parallel replica to the followers, encoded as one int64 array.

They hold token ids, positions and masks, never probabilities: followers run the rows that the leader chose and decide
nothing, so ranks can't disagree about a draft tree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

from worker.engine.segments import IntArray, KvMoves, Segments

_SEGMENTS = tuple(field.name for field in fields(Segments))  # columns, in the order of the array
_MOVES = tuple(field.name for field in fields(KvMoves))
_HEADER = 2 + len(_SEGMENTS) + len(_MOVES) + 1  # kind, model, and the length of every column
_NO_SEGMENTS, _NO_MOVES = Segments.of([]), KvMoves.of([])


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
    segments: Segments = _NO_SEGMENTS
    moves: KvMoves = _NO_MOVES
    numbers: tuple[int, ...] = ()

    def encode(self) -> IntArray:
        """Return the command as an array."""
        columns = [getattr(self.segments, name) for name in _SEGMENTS]
        columns += [getattr(self.moves, name) for name in _MOVES]
        columns.append(np.array(self.numbers, np.int64))
        header = np.array([self.kind, self.model, *map(len, columns)], np.int64)
        return np.concatenate([header, *columns])


def decode(words: IntArray) -> RankCommand:
    """Return the command in an array."""
    kind, model, *lengths = words[:_HEADER].tolist()
    *columns, numbers = np.split(words[_HEADER:], np.cumsum(lengths)[:-1])
    segments: dict[str, Any] = dict(zip(_SEGMENTS, columns, strict=False))
    segments["chains"] = segments["chains"].astype(np.bool_)
    return RankCommand(
        kind=CommandKind(kind),
        model=model,
        segments=Segments(**segments),
        moves=KvMoves(*columns[len(_SEGMENTS) :]),
        numbers=tuple(numbers.tolist()),
    )
