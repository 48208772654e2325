"""Laws of the compiled suffix index: it leaves the bits of its twin in Python."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.worker.engine.harness import sequences
from worker.drafters.suffix import memory
from worker.drafters.suffix.index import SuffixIndex
from worker.drafters.suffix.kernels import suffix_kernels
from worker.drafters.suffix.memory import MAX_COUNT, SLOT, TokenKind
from worker.drafters.suffix.python_kernels import PythonSuffixKernels
from worker.engine.speculation.draft_tree import Candidates, Forest

GROUPS = (1, 2, 2)
TOKENS = 5  # so few that contexts have more followers than places


def twins(slots: int) -> tuple[SuffixIndex, SuffixIndex]:
    compiled = suffix_kernels()
    assert not isinstance(compiled, PythonSuffixKernels), "there is no C compiler"
    return SuffixIndex(slots * SLOT.itemsize, compiled), SuffixIndex(slots * SLOT.itemsize, PythonSuffixKernels())


def read(index: SuffixIndex, seed: int) -> list[int]:
    """Read random tokens of all kinds, in parts; return the rows of the texts."""
    rng = np.random.default_rng(seed)
    rows = [index.start(group, 10 * group, 10 * group + place) for place, group in enumerate(GROUPS, 1)]
    for _ in range(12):
        counts = rng.integers(1, 20, len(rows)).tolist()
        kinds = rng.choice(list(TokenKind), sum(counts), p=[0.05, 0.3, 0.5, 0.05, 0.1])
        index.read(rows, counts, rng.integers(0, TOKENS, sum(counts)).tolist(), kinds.astype(np.uint8).tobytes())
    return rows


def bits(index: SuffixIndex) -> tuple[bytes, ...]:
    return tuple(getattr(index.memory, name).tobytes() for name in ("slots", "held", "trials"))


@pytest.mark.parametrize("slots", [32, 1 << 10])  # contexts replace each other, or all have a slot
def test_reading_and_lookups_are_the_same(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_FIRST_SLOTS", 64)
    compiled, plain = twins(slots)
    rows = read(compiled, slots)
    assert read(plain, slots) == rows
    assert bits(compiled) == bits(plain)
    used = int((compiled.memory.slots["hash"] > 0).sum())
    assert compiled.memory.layout.used == plain.memory.layout.used == used
    assert used > 0.9 * slots if slots == 32 else 64 < used < slots / 2
    forest = Forest(sequences([[2]] * len(rows)))
    frontier = forest.roots
    for _ in range(3):
        offers = [index.lookup(np.array(rows), forest, frontier) for index in (compiled, plain)]
        (tokens, probabilities), other = offers
        assert tokens.tobytes() == other[0].tobytes()
        assert probabilities.tobytes() == other[1].tobytes()
        assert (probabilities.sum(axis=1) <= 1.0 + 1e-12).all()
        frontier = forest.add_layer(frontier, Candidates(tokens[:, :3], probabilities[:, :3]), 0.001)


def test_a_very_frequent_follower_is_the_same() -> None:
    compiled, plain = twins(64)
    ids = [1, 2, 1, 3] + [1, 2] * (MAX_COUNT + 2)
    for index in (compiled, plain):
        index.read([index.start(1, 1, 2)], [len(ids)], ids, bytes([TokenKind.OUTPUT]) * len(ids))
    assert bits(compiled) == bits(plain)
    assert compiled.memory.slots["followers"]["count"].max() <= MAX_COUNT
