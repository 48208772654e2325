from __future__ import annotations

import pytest

from storage.fair_share import FairShare, JobShare


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
