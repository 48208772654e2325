"""Processes that share a device, as threads: turns, memory, and what happens when one of them ends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.errors import SetupError
from tests.clock import Clock
from worker.sharing.access import SharedAccess
from worker.sharing.broker import DeviceBroker

WAIT_S = 60.0  # a turn that is due comes at once


@pytest.fixture
def broker() -> Iterator[DeviceBroker]:
    with DeviceBroker(["one", "two"]) as running:
        yield running


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def work(access: SharedAccess, clock: Clock, name: str, step_s: float, turns: list[str]) -> None:
    """Run steps until the second model has had 30; each is noted while it has the device."""
    while turns.count("two") < 30:
        assert access.take_turn(WAIT_S)
        before = len(turns)
        clock.advance(step_s)
        turns.append(name)
        assert turns[before:] == [name], "one step runs at a time"
        access.end_turn(more=True)
    access.end_turn(more=False)


def test_two_models_that_are_full_get_as_much_time_though_one_has_steps_ten_times_as_long(
    broker: DeviceBroker, threads: ThreadPoolExecutor
) -> None:
    turns: list[str] = []
    steps_s = {"one": 1.0, "two": 10.0}
    clocks = [Clock(), Clock()]
    accesses = [SharedAccess(broker.address, index, clock) for index, clock in enumerate(clocks)]
    done = [
        threads.submit(work, access, clock, name, step_s, turns)
        for access, clock, (name, step_s) in zip(accesses, clocks, steps_s.items(), strict=True)
    ]
    for future in done:
        future.result(WAIT_S)
    both = turns[max(turns.index("one"), turns.index("two")) :]  # from when both are there
    ahead_s = 0.0
    for name in both[:-2]:  # at the end, one stops before the other
        ahead_s += steps_s[name] if name == "one" else -steps_s[name]
        assert abs(ahead_s) <= sum(steps_s.values()) + 1
    assert both.count("two") * 10 * 2 > len(both), "each has at least a third of the time"
    assert accesses[0].energy_share() + accesses[1].energy_share() == pytest.approx(1.0)


def test_a_device_that_no_other_wants_is_kept_without_asking_again(broker: DeviceBroker) -> None:
    access, other = SharedAccess(broker.address, 0, Clock()), SharedAccess(broker.address, 1, Clock())
    for _ in range(3):
        assert access.take_turn(WAIT_S)
        access.end_turn(more=True)
    assert access.take_turn(0.0), "it still has the device"
    assert not other.take_turn(0.0)
    access.end_turn(more=False)
    assert other.take_turn(WAIT_S), "an idle model holds no device"


def test_a_wish_that_is_withdrawn_blocks_no_other(broker: DeviceBroker) -> None:
    access, other = SharedAccess(broker.address, 0, Clock()), SharedAccess(broker.address, 1, Clock())
    assert access.take_turn(WAIT_S)
    assert not other.take_turn(0.0)
    other.end_turn(more=False)
    access.end_turn(more=False)
    for _ in range(3):  # a turn that crossed the withdrawal is not taken for a later one
        assert access.take_turn(WAIT_S)
        assert not other.take_turn(0.0)
        access.end_turn(more=False)
        assert other.take_turn(WAIT_S)
        assert not access.take_turn(0.0)
        other.end_turn(more=False)


def test_a_process_that_ends_in_its_step_gives_the_device_back(broker: DeviceBroker) -> None:
    access, other = SharedAccess(broker.address, 0, Clock()), SharedAccess(broker.address, 1, Clock())
    assert access.take_turn(WAIT_S)
    assert not other.take_turn(0.0)
    access.close()
    assert other.take_turn(WAIT_S)
    again = SharedAccess(broker.address, 0, Clock())
    assert not again.take_turn(0.0)
    other.end_turn(more=False)
    assert again.take_turn(WAIT_S)


def test_models_divide_the_memory_and_one_that_starts_again_gets_as_much(
    broker: DeviceBroker, threads: ThreadPoolExecutor
) -> None:
    def start(access: SharedAccess) -> int:
        access.admit(lambda: 10, lambda: 100)
        return access.memory_budget(lambda: 80)

    both = threads.map(start, [SharedAccess(broker.address, index) for index in range(2)])
    assert list(both) == [40, 40]
    assert start(SharedAccess(broker.address, 1)) == 40


def test_weights_that_do_not_fit_are_refused_before_any_is_loaded(
    broker: DeviceBroker, threads: ThreadPoolExecutor
) -> None:
    def start(index: int) -> str:
        with pytest.raises(SetupError) as refused:
            SharedAccess(broker.address, index).admit(lambda: 3 * 10**9, lambda: 5 * 10**9)
        return str(refused.value)

    assert all("one needs 3.00 GB and two needs 3.00 GB" in told for told in threads.map(start, range(2)))
