"""The suffix drafter finds earlier matches in the text, and learns how reliable they are."""

from __future__ import annotations

import numpy as np
import pytest

from worker.drafters.suffix import SuffixDrafter
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import IntArray
from worker.engine.sequence import FinishReason, Sequence
from worker.engine.speculation.draft_tree import Forest

EMPTY: IntArray = np.empty(0, np.int64)


def sequence(ids: list[int]) -> Sequence:
    return Sequence(0, ids, len(ids), 50, Sampling())


def offered(drafter: SuffixDrafter, text: Sequence) -> dict[int, float]:
    forest = Forest([text])
    found = drafter.expand(forest, forest.roots)
    return {int(t): float(p) for t, p in zip(found.tokens[0], found.probabilities[0], strict=True) if p > 0}


def test_the_longest_earlier_match_proposes_what_followed_it() -> None:
    assert offered(SuffixDrafter(), sequence([1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3])).keys() == {9}


def test_followers_share_the_reliability_by_frequency() -> None:
    shares = offered(SuffixDrafter(), sequence([4, 5, 1, 4, 6, 2, 4, 6, 3, 4]))
    assert shares.keys() == {5, 6}
    assert shares[6] == pytest.approx(2 * shares[5])


def test_a_new_token_proposes_nothing() -> None:
    assert not offered(SuffixDrafter(), sequence([1, 2, 3]))


def test_a_node_of_the_tree_is_matched_with_its_path() -> None:
    drafter, text = SuffixDrafter(), sequence([1, 2, 3, 4, 1, 2])
    forest = Forest([text])
    first = forest.add_layer(forest.roots, drafter.expand(forest, forest.roots))
    second = forest.add_layer(first, drafter.expand(forest, first))
    assert forest.token[first].tolist() == [3]
    assert forest.token[second].tolist() == [4]


def test_reliability_falls_with_misleading_matches_and_rises_with_right_ones() -> None:
    def trust_after(follower: int) -> float:
        drafter = SuffixDrafter()
        text = sequence([1, 2, 3] * 3)
        for _ in range(20):
            text.ids += [1, 2, follower]
            drafter.commit(Forest([text]), 0, EMPTY, [1, 2, follower])
        text.ids += [1, 2]
        return sum(offered(drafter, text).values())

    # A follower that always changes breaks every match; one that repeats keeps them.
    assert trust_after(3) > 0.9
    misled = SuffixDrafter()
    text = sequence([1, 2, 3, 1, 2])
    before = sum(offered(misled, text).values())
    for new in range(10, 40):
        text.ids += [new, 1, 2]
        misled.commit(Forest([text]), 0, EMPTY, [new, 1, 2])
    text.ids += [99, 1, 2]
    assert sum(offered(misled, text).values()) < before


def test_a_dropped_sequence_is_forgotten() -> None:
    drafter, text = SuffixDrafter(), sequence([1, 2, 1])
    offered(drafter, text)
    drafter.drop(text)
    text.ids[:] = [7, 8, 9]
    assert not offered(drafter, text)


def test_a_finished_text_is_a_source_for_others_of_its_group() -> None:
    drafter = SuffixDrafter()
    done, other, stranger = sequence([1, 2, 3, 4, 5]), sequence([7, 2, 3]), sequence([7, 2, 3])
    done.num_prompt = 2
    done.group = other.group = "job"
    stranger.group = "another job"
    done.finish_reason = FinishReason.LENGTH
    assert not offered(drafter, other)
    drafter.drop(done)
    assert offered(drafter, other).keys() == {4}
    assert not offered(drafter, stranger)


def test_the_longer_match_wins_in_the_own_text_or_in_another() -> None:
    drafter, done = SuffixDrafter(), sequence([5, 1, 2, 30])
    done.num_prompt, done.group, done.finish_reason = 1, "job", FinishReason.STOP
    drafter.drop(done)
    own = Sequence(0, [1, 2, 9, 6, 1, 2], 6, 50, Sampling(), group="job")
    assert offered(drafter, own).keys() == {9}  # both match two tokens: the text's own counts
    others = Sequence(0, [1, 2, 9, 5, 1, 2], 6, 50, Sampling(), group="job")
    assert offered(drafter, others).keys() == {30}  # three tokens match there


def test_a_cancelled_text_is_no_source_of_drafts() -> None:
    drafter, gone, other = SuffixDrafter(), sequence([1, 2, 3]), sequence([1, 2])
    gone.num_prompt, gone.cancelled = 1, True
    gone.group = other.group = "job"
    drafter.drop(gone)
    assert not offered(drafter, other)
