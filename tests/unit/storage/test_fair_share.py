from __future__ import annotations

import pytest

from storage.fair_share import Ageing, FairShare, JobShare


def share_of(running: dict[str, int]) -> FairShare:
    """Jobs by names like `alice/1`, with their running requests."""
    owners = {name: name.partition("/")[0] for name in running}
    totals = {owner: sum(n for name, n in running.items() if owners[name] == owner) for owner in owners.values()}
    return FairShare(JobShare(name, owners[name], count, totals[owners[name]]) for name, count in running.items())


@pytest.mark.parametrize(
    ("running", "slots", "shares"),
    [
        ({}, 4, {}),
        ({"a": 7}, 3, {"a": 3}),
        ({"a": 0, "b": 0}, 3, {"a": 2, "b": 1}),
        ({"a": 0, "b": 2}, 4, {"a": 3, "b": 1}),
        ({"a": 0, "b": 9}, 2, {"a": 2}),
        ({"a/1": 0, "a/2": 0, "a/3": 0, "b/1": 0}, 4, {"a/1": 1, "a/2": 1, "b/1": 2}),
        ({"a/1": 3, "a/2": 0, "b/1": 3}, 3, {"a/2": 2, "b/1": 1}),
    ],
)
def test_every_slot_goes_to_the_owner_and_then_to_the_job_with_the_fewest_running(
    running: dict[str, int], slots: int, shares: dict[str, int]
) -> None:
    assert share_of(running).allocate(slots) == shares


def test_a_job_that_has_just_taken_a_slot_waits_behind_those_that_have_not() -> None:
    share = share_of({"a/1": 0, "a/2": 0, "b/1": 0})
    share.add_running("a/1", 2)
    assert share.allocate(2) == {"b/1": 2}
    share.remove("b/1")
    assert share.allocate(2) == {"a/2": 2}


def test_a_job_gets_no_more_slots_than_it_has_room_for_and_others_get_the_rest() -> None:
    share = share_of({"a/1": 0, "a/2": 0, "b/1": 0})
    share.set_room("a/1", 1)
    share.set_room("b/1", 2)
    assert share.allocate(9) == {"a/1": 1, "a/2": 6, "b/1": 2}
    share.remove("a/2")
    assert share.allocate(9) == {"a/1": 1, "b/1": 2}
    share.add_running("a/1", 1)
    assert share.job_ids == ["b/1"]


def test_a_waiting_class_gets_a_slot_after_so_many_of_others_and_the_highest_one_the_rest() -> None:
    ageing = Ageing(requests=3)
    assert [ageing.choose([1, -1]) for _ in range(9)] == [1, 1, 1, -1, 1, 1, 1, -1, 1]
    assert [ageing.choose([-1]) for _ in range(2)] == [-1, -1]
    assert [ageing.choose([1, 0, -1]) for _ in range(9)] == [1, 1, 1, 0, -1, 1, 1, 0, -1]


def test_a_class_that_did_not_wait_has_not_aged() -> None:
    ageing = Ageing(requests=2)
    assert [ageing.choose(ranks) for ranks in ([1, 0], [1], [1, 0], [1, 0], [1, 0])] == [1, 1, 1, 1, 0]
