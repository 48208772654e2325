"""Gzip data unpacks in bounded pieces, in any parts."""

from __future__ import annotations

import gzip
import tracemalloc

import pytest

from jobs.errors import InvalidValue
from jobs.tables.gunzip import Gunzip, MaybeGzip, unpack, without_gz

TEXT = b'{"prompt": "Hello"}\n' * 1_000
PACKED = gzip.compress(TEXT, mtime=0)


def passed_through(*parts: bytes) -> bytes:
    file = MaybeGzip()
    passed = b"".join(piece for part in parts for piece in file.feed(part))
    return passed + b"".join(file.end())


def test_a_stream_unpacks_to_the_same_bytes_wherever_it_is_cut() -> None:
    for size in (1, 7, len(PACKED)):
        parts = [PACKED[at : at + size] for at in range(0, len(PACKED), size)]
        assert passed_through(*parts) == TEXT


def test_members_follow_each_other_and_padding_is_skipped() -> None:
    assert passed_through(PACKED + b"\0" * 40 + PACKED, PACKED) == TEXT * 3
    assert unpack(PACKED + b"\0\0", len(TEXT)) == TEXT
    assert unpack(gzip.compress(b""), 0) == b""


@pytest.mark.parametrize("content", [b"", b"\x1f", b"x", b"plain text", TEXT])
def test_other_files_pass_unchanged(content: bytes) -> None:
    assert passed_through(content[:1], content[1:]) == content


@pytest.mark.parametrize("damaged", [PACKED[:-1], PACKED[:5], PACKED + b"\x1f", PACKED[:-6] + b"123456", PACKED + b"x"])
def test_damaged_data_is_named(damaged: bytes) -> None:
    for read in (passed_through, lambda data: unpack(data, 10**9)):
        with pytest.raises(InvalidValue, match="gzip data"):
            read(damaged)


def test_a_bomb_is_refused_before_it_fills_the_memory() -> None:
    bomb = gzip.compress(bytes(50_000_000), 9)
    tracemalloc.start()
    with pytest.raises(InvalidValue, match="more than 1000000 bytes"):
        unpack(bomb, 1_000_000)
    assert max(len(piece) for piece in Gunzip().feed(bomb)) <= 1 << 18
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_an_unpacked_file_loses_its_suffix() -> None:
    assert [without_gz(name) for name in ("a.jsonl.gz", "a.JSONL.GZ", "a", ".gz", "")] == [
        *("a.jsonl", "a.JSONL", "a", ".gz", "")
    ]
