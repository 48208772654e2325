"""Turns of a device: fair in device time, whatever the steps of each model take."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from worker.sharing.fair_queue import FairQueue


def device_time(queue: FairQueue, step_s: list[float], turns: int) -> list[float]:
    """Let members with steps of these lengths always want more; return the device time that each got."""
    used = [0.0] * len(step_s)
    for member in range(len(step_s)):
        queue.want(member)
    for _ in range(turns):
        granted = queue.grant()
        assert granted is not None
        used[granted] += step_s[granted]
        queue.end_turn(granted, step_s[granted], more=True)
    return used


@pytest.mark.parametrize("step_s", [[1.0, 1.0], [0.001, 0.1], [5.0, 0.2, 0.03]])
def test_members_that_always_want_more_differ_by_at_most_the_longest_step_of_each(step_s: list[float]) -> None:
    turns = 40 * round(max(step_s) / min(step_s))
    used = device_time(FairQueue(len(step_s)), step_s, turns)
    for one, other in pairwise(used):
        assert abs(one - other) <= max(step_s) + min(step_s)
    assert min(used) > sum(used) / (1.5 * len(used)), "of two full models, each gets at least a third"


def test_idleness_earns_no_credit() -> None:
    queue = FairQueue(2)
    for _ in range(1000):  # the first works alone
        queue.want(0)
        assert queue.grant() == 0
        queue.end_turn(0, 1.0, more=False)
    used = device_time(queue, [1.0, 1.0], 10)
    assert used == [5.0, 5.0]


def test_turns_that_no_other_waits_for_are_charged_by_their_last_step() -> None:
    queue = FairQueue(2)
    queue.want(0)
    assert queue.grant() == 0  # for a thousand steps
    queue.want(1)
    assert queue.contended
    queue.end_turn(0, 1.0, more=True)
    assert device_time(queue, [1.0, 1.0], 10) == [5.0, 5.0]


def test_one_member_has_the_device_at_a_time_and_all_that_want_it_get_it() -> None:
    queue, chance = FairQueue(3), random.Random(1)
    waits = [0, 0, 0]
    for _ in range(2000):
        member = chance.randrange(3)
        if queue.holder == member:
            assert queue.grant() is None
            queue.end_turn(member, chance.random(), more=chance.random() < 0.5)
        elif chance.random() < 0.1:
            queue.leave(member)  # its process has ended
        else:
            queue.want(member)
        granted = queue.grant()
        if granted is not None:
            assert queue.holder == granted
            waits[granted] += 1
    assert min(waits) > 100
    queue.leave(queue.holder or 0)
    for member in range(3):
        queue.want(member)
    first = queue.grant()
    assert first is not None
    queue.leave(first)  # it was killed in its step
    assert queue.grant() not in (None, first)


def test_a_wish_that_is_withdrawn_is_not_granted() -> None:
    queue = FairQueue(2)
    queue.want(0)
    queue.end_turn(0, 0.0, more=False)
    assert queue.grant() is None
