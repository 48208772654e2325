"""Segments, KV moves and results of a step as arrays: the same as one object for each."""

from __future__ import annotations

import pickle
from dataclasses import fields

import numpy as np
import pytest

from tests.unit.worker.engine.harness import FLAT_COSTS, drafter, options, sequences, shared_target
from worker.engine.engine import Engine
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import KvMove, KvMoves, Segment, Segments, chain

ROOT_AND_TWO = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], np.bool_)
DEEPER = np.array([[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], np.bool_)  # rows below three that an earlier forward stored
SOME = [
    chain(3, 0, [5, 6, 7], keep_last=False),
    Segment(1, 4, 4, np.array([8, 9, 10]), np.array([4, 5, 5]), ROOT_AND_TWO, np.arange(3)),
    chain(0, 9, [11], keep_last=True),
    Segment(2, 6, 9, np.array([12, 13]), np.array([8, 8]), DEEPER, np.array([1])),
]
MOVES = [KvMove(0, 5, np.array([6, 8])), KvMove(1, 3, np.array([3, 4])), KvMove(2, 7, np.array([9]))]


def alike(some: object, other: object) -> bool:
    """Return True if all fields of two dataclasses are equal."""
    return all(np.array_equal(getattr(some, f.name), getattr(other, f.name)) for f in fields(some))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 1, 3, 0]])
def test_segments_are_the_same_as_arrays_in_any_order(order: list[int]) -> None:
    parts = Segments.joined(Segments.of(SOME[:2]), Segments.of(SOME[2:]))
    found = parts.ordered(np.array(order))
    assert len(found) == 4
    for segment, expected in zip(found, [SOME[i] for i in order], strict=True):
        assert (segment.visible is None) == (expected.visible is None)
        assert alike(segment, expected)
    assert alike(found[1], SOME[order[1]])
    assert alike(found, Segments.of([SOME[i] for i in order]))


def test_moves_as_arrays_leave_out_those_in_place() -> None:
    found = KvMoves.of(MOVES)
    assert [move.slot for move in found] == [0, 2]
    assert all(alike(move, expected) for move, expected in zip(found, [MOVES[0], MOVES[2]], strict=True))
    assert found.targets.tolist() == [5, 6, 7]


def test_results_are_the_same_in_another_process() -> None:
    some = sequences(max_tokens=6, sampling=Sampling(logprobs=2), eos_ids=[3])
    for sequence in some:
        sequence.traced_steps = 3
    running = Engine(shared_target(), drafter("suffix"), options(Mode.PAPER), FLAT_COSTS)
    for sequence in some:
        running.add(sequence)
    emitted: dict[int, list[int]] = {sequence.number: [] for sequence in some}
    ended: set[int] = set()
    while running.busy:
        results = running.step()
        assert list(pickle.loads(pickle.dumps(results))) == list(results)
        for result in results:
            emitted[result.number] += result.tokens
            assert len(result.tokens) == result.stats.emitted_tokens
            assert (result.tree is not None) == (result.stats.step < 3)
            assert result.stats.reached is None or sum(r is not None for _, r in result.stats.reached) <= len(
                result.tokens
            )
        ended |= {result.number for result in results if result.finish_reason is not None}
        assert set(results.finished.tolist()) <= ended
    assert emitted == {sequence.number: sequence.output_ids for sequence in some}
    assert ended == set(emitted), "the last result of each sequence says why it ended"
