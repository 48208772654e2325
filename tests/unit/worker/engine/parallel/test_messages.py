"""Laws of the messages between ranks: they come back as they were sent, and a damaged or misplaced one is refused."""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.worker.engine.paged.test_attention import STEPS
from worker.engine.errors import MessageRefused
from worker.engine.paged.rows import Shape
from worker.engine.paged.step import PagedStep
from worker.engine.parallel.channel import LEAST_WORDS, RankChannel
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.parallel.messages import HEAD, opened, sealed
from worker.engine.segments import IntArray, KvMove, KvMoves, Segments

NUMBERS = st.integers(0, 2**40)


def some(count: int) -> IntArray:
    return np.arange(count) * 7 + 3


@st.composite
def steps(draw: st.DrawFn) -> PagedStep:
    small = st.integers(0, 5)
    sizes: dict[str, Any] = {field.name: draw(NUMBERS) for field in fields(Shape)[:-1]} | {
        "causal": draw(st.booleans())
    }
    shape = Shape(**sizes, row_bounds=tuple(draw(st.lists(NUMBERS, min_size=2, max_size=4))))
    moves = [some(2 * draw(small)).reshape(2, -1) for _ in range(draw(small))]
    return PagedStep(shape, draw(st.booleans()), some(draw(small)), some(3 * draw(small)).reshape(3, -1), moves)


@settings(max_examples=30, deadline=None)
@given(step=steps(), number=NUMBERS)
def test_a_step_comes_back_from_its_array_as_it_was(step: PagedStep, number: int) -> None:
    command = RankCommand(CommandKind.STEP, model=1, step=step)
    (found,) = opened(sealed([command], number), number)
    assert (found.kind, found.model, found.numbers) == (CommandKind.STEP, 1, ())
    assert found.step is not None
    assert (found.step.shape, found.step.in_bucket) == (step.shape, step.in_bucket)
    assert np.array_equal(found.step.flat, step.flat)
    assert np.array_equal(found.step.blocks, step.blocks)
    assert [moved.tolist() for moved in found.step.moves] == [moved.tolist() for moved in step.moves]


def commands() -> list[RankCommand]:
    """Return what one message brings: what happened to KV slots, and a forward."""
    moves = KvMoves.of([KvMove(1, 4, np.array([5, 7])), KvMove(2, 9, np.array([11]))])
    return [
        RankCommand(CommandKind.TRUNCATE, 0, numbers=(3, 17)),
        RankCommand(CommandKind.COMPACT, 1, moves=moves),
        RankCommand(CommandKind.FORWARD, 0, segments=Segments.of([*STEPS["prompts"], *STEPS["a tree"]])),
    ]


def test_the_commands_of_a_message_come_back_in_their_order() -> None:
    sent = commands()
    found = opened(sealed(sent, 6), 6)
    assert [command.kind for command in found] == [command.kind for command in sent]
    assert all(np.array_equal(one.encode(), other.encode()) for one, other in zip(found, sent, strict=True))
    assert found[2].segments.chains.dtype == np.bool_


@pytest.mark.parametrize("at", [0, 1, 2, 3, HEAD, HEAD + 40, -1])
def test_a_damaged_message_is_refused(at: int) -> None:
    words = sealed(commands(), 6)
    words[at] ^= 1 << 17
    with pytest.raises(MessageRefused, match=r"essage 6 from the first rank is damaged.*the replica restarts"):
        opened(words, 6)


def test_a_message_that_lost_its_end_is_refused() -> None:
    with pytest.raises(MessageRefused, match="Message 6 from the first rank is damaged"):
        opened(sealed(commands(), 6)[:-1], 6)


@pytest.mark.parametrize("number", [5, 7])
def test_a_message_out_of_order_is_refused(number: int) -> None:
    with pytest.raises(MessageRefused, match=f"Message {number} came from the first rank where 6 was due"):
        opened(sealed(commands(), number), 6)


class OneProcess(RankChannel):
    """Both ends of a channel: arrays go through a queue."""

    def __init__(self, passed: deque[IntArray]) -> None:
        self._number, self._room, self.passed, self.broadcasts = 0, LEAST_WORDS, passed, 0

    def _broadcast(self, words: IntArray) -> None:
        self.passed.append(words)
        self.broadcasts += 1

    def _receive(self, count: int) -> IntArray:
        words = self.passed.popleft()
        assert len(words) == count, "the ends disagree about a length"
        return words


def test_a_message_is_one_broadcast_unless_it_is_much_longer_than_the_one_before() -> None:
    passed: deque[IntArray] = deque()
    leader, follower = OneProcess(passed), OneProcess(passed)
    needed = []
    for length in (10, 5000, 5000, 7000, 10, 10, 5000):
        sent = RankCommand(CommandKind.STEP, numbers=tuple(range(length)))
        leader.send([sent])
        (found,) = follower.recv()
        assert found.numbers == sent.numbers
        needed.append(leader.broadcasts)
        leader.broadcasts = 0
    assert needed == [1, 2, 1, 1, 1, 1, 2]


def test_a_rank_that_missed_a_message_ends_at_the_next_one() -> None:
    passed: deque[IntArray] = deque()
    leader, follower = OneProcess(passed), OneProcess(passed)
    leader.send(commands())
    passed.clear()
    leader.send(commands())
    with pytest.raises(MessageRefused, match="Message 1 came from the first rank where 0 was due"):
        follower.recv()
