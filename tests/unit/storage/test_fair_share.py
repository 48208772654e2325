from __future__ import annotations

import pytest

from storage.fair_share import FairShare, JobShare


def turns_of(running: dict[str, int]) -> FairShare:
    """Jobs by names like `alice/1`, with their running requests."""
    owners = {name: name.partition("/")[0] for name in running}
    totals = {owner: sum(n for name, n in running.items() if owners[name] == owner) for owner in owners.values()}
    return FairShare(JobShare(name, owners[name], count, totals[owners[name]]) for name, count in running.items())


@pytest.mark.parametrize(
    ("running", "places", "shares"),
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
def test_every_place_goes_to_the_owner_and_then_to_the_job_with_the_fewest_running(
    running: dict[str, int], places: int, shares: dict[str, int]
) -> None:
    assert turns_of(running).allocate(places) == shares


def test_who_has_taken_a_place_waits_behind_those_who_have_not() -> None:
    turns = turns_of({"a/1": 0, "a/2": 0, "b/1": 0})
    turns.took("a/1", 2)
    assert turns.allocate(2) == {"b/1": 2}
    turns.leave("b/1")
    assert turns.allocate(2) == {"a/2": 2}
