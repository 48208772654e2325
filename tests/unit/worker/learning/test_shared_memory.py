"""Laws of the memory that learning shares: it is bounded, texts come back as they were, and nothing damaged is read."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from worker.learning.shared_memory import MAX_TEXT_TOKENS, RingShape, SharedTensors, TextRing, anonymous_file

SHAPE = RingShape.of(states=6, width=4, dtype=torch.bfloat16, max_bytes=0)


@pytest.fixture
def ring_file() -> Iterator[int]:
    descriptor = anonymous_file(TextRing.size_of(SHAPE))
    yield descriptor
    os.close(descriptor)


def append(ring: TextRing, ids: list[int], num_prompt: int = 1) -> None:
    n = len(ids)
    ring.append(ids, num_prompt, torch.full((n - 1, 6), float(ids[0])), torch.full((n, 4), float(ids[-1])))


def test_another_mapping_reads_a_text_as_it_was_appended(ring_file: int) -> None:
    append(TextRing(ring_file, SHAPE), [5, 6, 7, 8], num_prompt=2)
    read = TextRing(ring_file, SHAPE).read(0)
    assert read is not None
    assert (read.ids.tolist(), read.num_prompt) == ([5, 6, 7, 8], 2)
    assert read.states[:3].eq(5).all()
    assert read.embedded.eq(8).all()


def test_new_texts_overwrite_the_oldest_and_the_memory_never_grows(ring_file: int) -> None:
    ring, length = TextRing(ring_file, SHAPE), 300
    for first in range(1, 9):
        append(ring, [first] * length)
    kept = [number for number in range(8) if ring.read(number) is not None]
    assert kept == list(range(8 - len(kept), 8))
    assert 1 <= len(kept) <= SHAPE.rows // length
    for number in kept:
        read = ring.read(number)
        assert read is not None
        assert set(read.ids.tolist()) == {number + 1}
    assert os.fstat(ring_file).st_size == TextRing.size_of(SHAPE)


def test_the_end_of_a_long_text_is_kept(ring_file: int) -> None:
    ring = TextRing(ring_file, SHAPE)
    append(ring, list(range(MAX_TEXT_TOKENS + 40)), num_prompt=50)
    read = ring.read(0)
    assert read is not None
    assert read.ids.tolist() == list(range(40, MAX_TEXT_TOKENS + 40))
    assert read.num_prompt == 10


def test_tensors_come_back_with_their_version_and_damaged_ones_are_refused() -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4)}
    descriptor = anonymous_file(SharedTensors.size_of(tensors))
    written, read = SharedTensors(descriptor), SharedTensors(descriptor)
    written.write(tensors)
    assert read.version == 1
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.read().items())
    read._memory[200] ^= 0x40
    with pytest.raises(ValueError, match="checksum"):
        read.read()
    written.write({"a": torch.full((3, 5), torch.nan), "b": torch.arange(4)})
    with pytest.raises(ValueError, match="finite"):
        read.read()
    os.close(descriptor)
