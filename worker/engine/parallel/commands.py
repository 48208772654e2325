"""Commands from the leader of a tensor parallel replica to the followers, encoded as int64 arrays.

They hold token ids, positions and masks, never probabilities: followers run the rows that the leader chose and decide
nothing, so ranks can't disagree about a draft tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

from worker.engine.paged.step import COLUMNS, PagedStep
from worker.engine.segments import IntArray, KvMoves, Segments

_SEGMENTS = tuple(field.name for field in fields(Segments))  # columns, in the order of the array
_MOVES = tuple(field.name for field in fields(KvMoves))
_HEADER = 2 + len(_SEGMENTS) + len(_MOVES) + COLUMNS + 1  # kind, model, and the length of every column
_NO_SEGMENTS, _NO_MOVES = Segments.of([]), KvMoves.of([])
_NO_STEP = (np.empty(0, np.int64),) * COLUMNS


class CommandKind(IntEnum):
    """What a follower must do."""

    FORWARD = 0
    COMPACT = 1
    COPY_PREFIX = 2
    BUILD = 3  # create the KV slots of a loaded model
    FREE_MEMORY = 4  # report the memory that the largest forward leaves free
    END = 5
    TRUNCATE = 6
    CLEAR = 7
    PREPARE = 8
    STEP = 9  # a forward over paged KV


@dataclass(frozen=True, slots=True)
class RankCommand:
    """One command; its kind decides which fields are set."""

    kind: CommandKind
    model: int = 0
    segments: Segments = _NO_SEGMENTS
    moves: KvMoves = _NO_MOVES
    step: PagedStep | None = None
    numbers: tuple[int, ...] = ()

    def encode(self) -> IntArray:
        """Return the command as an array."""
        columns = [getattr(self.segments, name) for name in _SEGMENTS]
        columns += [getattr(self.moves, name) for name in _MOVES]
        columns += _NO_STEP if self.step is None else self.step.columns()
        columns.append(np.array(self.numbers, np.int64))
        header = np.array([self.kind, self.model, *map(len, columns)], np.int64)
        return np.concatenate([header, *columns])


def decode(words: IntArray) -> Iterator[RankCommand]:
    """Yield the commands of an array, which holds one after the other."""
    while len(words):
        kind, model, *lengths = words[:_HEADER].tolist()
        *columns, words = np.split(words[_HEADER:], np.cumsum(lengths))
        *given, numbers = columns
        rows, moves, step = given[: len(_SEGMENTS)], given[len(_SEGMENTS) : -COLUMNS], given[-COLUMNS:]
        segments: dict[str, Any] = dict(zip(_SEGMENTS, rows, strict=True))
        segments["chains"] = segments["chains"].astype(np.bool_)
        yield RankCommand(
            kind=CommandKind(kind),
            model=model,
            segments=Segments(**segments),
            moves=KvMoves(*moves),
            step=PagedStep.of(step) if len(step[0]) else None,
            numbers=tuple(numbers.tolist()),
        )
