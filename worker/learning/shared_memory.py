"""Memory that a process shares with its child: files without a name, which vanish with both.

`TextRing` holds the texts to learn from. `SharedTensors` holds weights. Neither side ever waits for the other.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

MAX_TEXTS = 1024  # records of a ring
MAX_TEXT_TOKENS = 512  # of a longer text the last are kept
_RECORD = 3  # numbers: first row, tokens, prompt tokens
_LINE = 64  # bytes: parts begin at cache lines
_INDEX_BYTES, _TENSOR_BYTES = 64, 256  # at most, of the safetensors header: for all tensors, and for each


def anonymous_file(size: int) -> int:
    """Return the descriptor of a file of `size` bytes, all zero, that has no name; it takes memory as it is written."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("basic-learning")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


@dataclass(frozen=True, slots=True)
class RingShape:
    """Size of a ring."""

    rows: int  # tokens of all texts
    states: int  # size of the target's hidden states of a token
    width: int  # size of the embedding of a token
    dtype: str  # of both, as in torch

    @classmethod
    def of(cls, states: int, width: int, dtype: torch.dtype, max_bytes: int) -> RingShape:
        """Return the largest ring of at most `max_bytes`, but room for two texts at least."""
        row_bytes = (states + width) * dtype.itemsize + 8
        rows = max(max_bytes // row_bytes, 2 * MAX_TEXT_TOKENS)
        return cls(rows, states, width, str(dtype).removeprefix("torch."))

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype of the states and embeddings."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True)
class LearningText:
    """A text of the target; row p of `states` is the target's after it has read token p."""

    ids: Tensor  # [n] int64
    num_prompt: int  # tokens that the target did not write
    states: Tensor  # [n, taps * width]; the last row is unused
    embedded: Tensor  # [n, width] embeddings of the tokens


class TextRing:
    """The latest texts of the target: one process appends, another reads. A new text overwrites the oldest ones."""

    def __init__(self, descriptor: int, shape: RingShape) -> None:
        """Map the file, which has `size_of` bytes."""
        self.shape = shape
        self._memory = mmap.mmap(descriptor, self.size_of(shape))
        parts = iter(_offsets(_part_bytes(shape)))
        rows, dtype = shape.rows, shape.torch_dtype
        # Texts appended; rows taken for them; texts learned.
        self._counts = np.frombuffer(self._memory, np.int64, 3, next(parts))
        records = np.frombuffer(self._memory, np.int64, MAX_TEXTS * _RECORD, next(parts))
        self._records = records.reshape(MAX_TEXTS, _RECORD)
        self._ids = np.frombuffer(self._memory, np.int64, rows, next(parts))
        self._states, self._embedded = (
            torch.frombuffer(self._memory, dtype=dtype, count=rows * size, offset=next(parts)).view(rows, size)
            for size in (shape.states, shape.width)
        )

    @staticmethod
    def size_of(shape: RingShape) -> int:
        """Return the bytes of a ring."""
        *_, end = _offsets(_part_bytes(shape))
        return end

    @property
    def appended(self) -> int:
        """Number of texts that were ever appended. Text `n` is the n-th of them, from 0."""
        return int(self._counts[0])

    @property
    def backlog(self) -> int:
        """Number of texts that the reader has not learned yet."""
        return int(self._counts[0] - self._counts[2])

    def mark_learned(self, count: int) -> None:
        """Record how many texts the reader has learned."""
        self._counts[2] = count

    def append(self, ids: Sequence[int], num_prompt: int, states: Tensor, embedded: Tensor) -> None:
        """Append a text of n tokens, with `states` [n - 1, taps * width] and `embedded` [n, width]."""
        cut = max(len(ids) - MAX_TEXT_TOKENS, 0)
        kept, states, embedded = ids[cut:], states[cut:], embedded[cut:]
        rows, n, number = self.shape.rows, len(kept), self.appended
        start = int(self._counts[1])
        if start % rows + n > rows:
            start += rows - start % rows  # a text is not split at the end of the memory
        self._counts[1] = start + n  # first: a reader of what is overwritten now finds out
        first = start % rows
        self._ids[first : first + n] = kept
        self._states[first : first + n - 1] = states
        self._embedded[first : first + n] = embedded
        self._records[number % MAX_TEXTS] = start, n, max(num_prompt - cut, 1)
        self._counts[0] = number + 1

    def read(self, number: int) -> LearningText | None:
        """Return a copy of text `number`; None if it is not there any more."""
        if not max(self.appended - MAX_TEXTS, 0) <= number < self.appended:
            return None
        start, n, num_prompt = self._records[number % MAX_TEXTS].tolist()
        first = start % self.shape.rows
        text = LearningText(
            torch.from_numpy(self._ids[first : first + n].copy()),
            num_prompt,
            self._states[first : first + n].clone(),
            self._embedded[first : first + n].clone(),
        )
        intact = int(self._counts[1]) - start <= self.shape.rows and number >= self.appended - MAX_TEXTS
        return text if intact else None


class SharedTensors:
    """Named tensors that one process writes and another reads, with a version and a checksum."""

    def __init__(self, descriptor: int) -> None:
        """Map a whole file; see `size_of`."""
        self._memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._header = np.frombuffer(self._memory, np.int64, 3)  # version, bytes, checksum

    @staticmethod
    def size_of(tensors: Mapping[str, Tensor]) -> int:
        """Return the bytes of a file that holds such tensors."""
        return _LINE + _INDEX_BYTES + sum(_TENSOR_BYTES + tensor.nbytes for tensor in tensors.values())

    @property
    def version(self) -> int:
        """How often the tensors were written."""
        return int(self._header[0])

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write all tensors; a reader sees the next version when the last byte is there."""
        body = save(dict(tensors))
        self._memory[_LINE : _LINE + len(body)] = body
        self._header[1:] = len(body), zlib.crc32(body)
        self._header[0] += 1

    def read(self) -> dict[str, Tensor]:
        """Return a copy of the tensors. Raises ValueError if they are damaged, or are just being written."""
        _, length, checksum = self._header.tolist()
        body = self._memory[_LINE : _LINE + length]
        if zlib.crc32(body) != checksum:
            raise ValueError("their checksum is wrong")
        tensors = load(body)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("not all of them are finite")
        return tensors


def _part_bytes(shape: RingShape) -> list[int]:
    itemsize = shape.torch_dtype.itemsize
    parts = (24, MAX_TEXTS * _RECORD * 8, shape.rows * 8)
    return [*parts, shape.rows * shape.states * itemsize, shape.rows * shape.width * itemsize]


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Return where parts of these bytes begin, and the end of the last."""
    offsets = [0]
    for size in sizes:
        offsets.append(-(-(offsets[-1] + size) // _LINE) * _LINE)
    return offsets
