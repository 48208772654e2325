"""The suffix drafter finds earlier matches in the texts of a group, and learns how reliable they are."""

from __future__ import annotations

import numpy as np
import pytest

from worker.drafters.suffix.drafter import SuffixDrafter
from worker.drafters.suffix.memory import CONTEXT, SLOT
from worker.engine.host.growth import CompiledGrowth, growth_library
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import IntArray
from worker.engine.sequence import FinishReason, Sequence
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.drafting import Parts, grow, grow_compiled
from worker.engine.speculation.tree_budget import FixedBudget

EMPTY: IntArray = np.empty(0, np.int64)


def sequence(ids: list[int], prompt: int | None = None, group: str | None = None) -> Sequence:
    return Sequence(0, ids, len(ids) if prompt is None else prompt, 50, Sampling(), group=group)


def offered(drafter: SuffixDrafter, text: Sequence) -> dict[int, float]:
    forest = Forest([text])
    found = drafter.expand(forest, forest.roots)
    return {int(t): float(p) for t, p in zip(found.tokens[0], found.probabilities[0], strict=True) if p > 0}


def finish(drafter: SuffixDrafter, text: Sequence) -> None:
    text.finish_reason = FinishReason.STOP
    drafter.drop(text)


def tokens_per_step(drafter: SuffixDrafter, texts: list[list[int]], prompt: int, group: str | None = None) -> float:
    """Decode known texts together, each with a chain of the best candidates of up to four tokens."""
    running = [sequence(ids[: prompt + 1], prompt, group) for ids in texts]
    steps = 0
    while any(len(one.ids) < len(ids) for one, ids in zip(running, texts, strict=True)):
        for one, ids in zip(running, texts, strict=True):
            if len(one.ids) == len(ids):
                continue
            forest, accepted = Forest([one]), 0
            nodes = forest.roots
            while accepted < 4:
                found = drafter.expand(forest, nodes)
                nodes = forest.add_layer(nodes, found)[:1]
                known = ids[len(one.ids) + accepted :][:1]
                if not len(nodes) or known != [forest.token[nodes[0]]]:
                    break
                accepted += 1
            emitted = ids[len(one.ids) : len(one.ids) + accepted + 1]
            one.ids += emitted
            steps += 1
            drafter.commit(forest, 0, EMPTY, emitted)
    return sum(len(ids) - prompt - 1 for ids in texts) / steps


def test_what_followed_the_longest_match_ranks_first_and_what_followed_shorter_ones_after_it() -> None:
    found = offered(SuffixDrafter(), sequence([1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3]))
    assert list(found) == [9, 7]
    assert found[9] > 2 * found[7]


def test_a_match_may_be_longer_than_six_tokens() -> None:
    same = [2, 3, 4, 5, 6, 7, 8]
    text = sequence([*([1, *same, 20, 11, *same, 21] * 4), 12, 1, *same])
    assert next(iter(offered(SuffixDrafter(), text))) == 20, "the token before the seven tells which one follows"


def test_the_more_frequent_follower_is_the_more_likely() -> None:
    shares = offered(SuffixDrafter(), sequence([4, 5, 1, 4, 6, 2, 4, 6, 3, 4, 6, 1, 4]))
    assert shares.keys() == {5, 6}
    assert shares[6] > 1.5 * shares[5]


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
    def trust_after(followers: list[int]) -> float:
        drafter, text = SuffixDrafter(), sequence([1, 2, 3] * 3)
        for follower in followers:
            text.ids += [1, 2, follower]
            offered(drafter, text)
        text.ids += [1, 2]
        return sum(offered(drafter, text).values())

    # A follower that always changes breaks every match; one that repeats keeps them.
    assert trust_after([3] * 30) > 0.8
    assert trust_after(list(range(10, 40))) < 0.5


def test_a_token_that_a_grammar_forced_teaches_nothing() -> None:
    drafter, text = SuffixDrafter(), sequence([1, 2, 3, 1, 2])
    forest = Forest([text])
    drafter.expand(forest, forest.roots)
    before = drafter._index.memory.held.tobytes()
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    forest.append(zero, zero, 9 * one, one, np.ones(1), forced=True)
    text.ids += [9]
    drafter.commit(forest, 0, np.array([1]), [9])
    offered(drafter, text)
    assert drafter._index.memory.held.tobytes() == before
    text.ids += [8]
    offered(drafter, text)
    assert drafter._index.memory.held.tobytes() == before, "after a new token nothing was offered"
    text.ids += [1, 2, 3]
    offered(drafter, text)
    assert drafter._index.memory.held.tobytes() != before


def test_a_running_text_is_a_source_for_others_of_its_group_and_for_no_other() -> None:
    drafter = SuffixDrafter()
    running, alone = sequence([1, 2, 3, 4, 5], 2, "job"), sequence([1, 2, 3, 4, 5], 2)
    offered(drafter, running)
    offered(drafter, alone)
    assert offered(drafter, sequence([7, 2, 3], group="job")).keys() == {4}
    assert not offered(drafter, sequence([7, 2, 3], group="another job"))
    assert not offered(drafter, sequence([7, 2, 3])), "a sequence without a group drafts from no other"


def test_no_token_of_another_group_is_ever_offered() -> None:
    """However full the index is: groups share its memory, and the contexts that they have are the same."""
    drafter, rng = SuffixDrafter(64 * SLOT.itemsize), np.random.default_rng(0)
    texts = [sequence([group * 10, group * 10 + 1], group=f"job {group}") for group in range(4)]
    for _ in range(100):
        forest = Forest(texts)
        found = drafter.expand(forest, forest.roots)
        foreign = (found.tokens // 10 != np.arange(4)[:, None]) & (found.probabilities > 0)
        assert not foreign.any()
        for group, text in enumerate(texts):
            text.ids += (group * 10 + rng.integers(0, 3, 4)).tolist()


def test_a_finished_text_stays_a_source_even_if_nothing_was_drafted_for_it() -> None:
    drafter, done = SuffixDrafter(), sequence([1, 2, 3, 4, 5], 2, "job")
    finish(drafter, done)
    assert offered(drafter, sequence([7, 2, 3], group="job")).keys() == {4}
    assert not offered(drafter, sequence([7, 2, 3], group="another job"))


def test_the_longer_match_wins_in_the_own_text_or_in_another() -> None:
    drafter = SuffixDrafter()
    finish(drafter, sequence([5, 1, 2, 30], 1, "job"))
    assert next(iter(offered(drafter, sequence([9, 1, 2, 40, 7, 5, 1, 2], group="job")))) == 30


@pytest.mark.parametrize("end", ["cancelled", "preempted"])
def test_a_text_that_was_dropped_before_its_end_leaves_nothing_behind(end: str) -> None:
    drafter = SuffixDrafter()
    kept, gone = sequence([1, 2, 3, 1, 2], 2, "job"), sequence([1, 2, 5, 6, 5, 6, 1, 2, 3], 2, "job")
    offered(drafter, kept)
    before = drafter._index.memory.slots["followers"]["token"].copy()
    offered(drafter, gone)
    gone.cancelled = end == "cancelled"
    drafter.drop(gone)
    assert np.isin(drafter._index.memory.slots["followers"]["token"], before).all()
    assert drafter._index.num_texts == len(drafter._texts) == 1
    assert offered(drafter, kept).keys() == {3}, "a common prompt stays"
    assert not offered(drafter, sequence([9, 5], group="job"))


def test_what_prompts_have_in_common_stays_when_one_of_them_is_dropped() -> None:
    drafter, template = SuffixDrafter(), [1, 2, 3, 4]
    first = sequence([*template, 10, 11], group="job")
    second = sequence([*template, 20, 21, 1, 2], group="job")
    choice = sequence([*template, 20, 21, 1, 2], group="job")
    for text in (first, second, choice):
        offered(drafter, text)
    for text in (first, choice):
        text.cancelled = True
        drafter.drop(text)
    assert offered(drafter, second).keys() == {3}
    drafter.drop(second)
    assert np.isin(drafter._index.memory.slots["followers"]["token"], [0, *template]).all()
    assert not drafter._texts
    assert not drafter._groups["job"].prompts


def test_a_preempted_sequence_continues_where_it_was() -> None:
    drafter, text = SuffixDrafter(), sequence([1, 2, 3, 4, 1, 2], 2, "job")
    before = offered(drafter, text)
    drafter.drop(text)
    assert offered(drafter, text).keys() == before.keys()


def test_the_memory_stays_in_its_bound_over_a_long_job_and_forgets_the_oldest() -> None:
    slots = 1 << 10
    drafter, rng = SuffixDrafter(slots * SLOT.itemsize + 100), np.random.default_rng(0)
    memory = drafter._index.memory
    address = memory.layout.slots
    ids = rng.integers(0, 10**6, (60, 200)).tolist()
    for one in ids:
        finish(drafter, sequence(list(one), 20, "job"))
    assert memory.slots.nbytes == slots * SLOT.itemsize
    assert memory.layout.slots == address
    assert len(memory.texts) <= 8
    assert not drafter._texts
    assert not drafter._groups["job"].prompts

    def known(one: list[int]) -> int:
        places = range(100, 199)
        return sum(one[i + 1] in offered(drafter, sequence(one[i - 2 : i + 1], group="job")) for i in places)

    assert known(ids[-1]) > 90, "new texts are remembered"
    assert known(ids[0]) == 0, "old ones are forgotten"


def test_groups_without_sequences_are_forgotten() -> None:
    drafter = SuffixDrafter(1 << 12)
    for number in range(80):
        finish(drafter, sequence([1, 2, 3], 1, f"job {number}"))
    assert len(drafter._groups) == 64


def test_an_index_shared_by_choices_raises_tokens_per_step_on_repetitive_jobs() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 500, 2 * CONTEXT).tolist()
    phrases = rng.integers(0, 500, (12, 6)).tolist()
    choices = [[*prompt, *np.concatenate([phrases[i] for i in rng.permutation(12)]).tolist()] for _ in range(4)]
    shared = tokens_per_step(SuffixDrafter(), choices, len(prompt), "job")
    alone = tokens_per_step(SuffixDrafter(), choices, len(prompt))
    assert shared > 1.5 * alone


@pytest.mark.parametrize("trees", [1, 3])
def test_trees_that_grow_in_one_call_are_those_of_layers(trees: int) -> None:
    texts = [[1, 2, 3, 4, 2, 3, 5, 1, 2, 3], [7, 8, 7, 8, 9, 7, 8], [4, 4, 4, 2, 3, 4, 4]][:trees]
    library = growth_library()
    assert library is not None, "there is no C compiler"
    forests = [Forest([sequence(ids, group="job") for ids in texts]) for _ in range(2)]
    grow(forests[0], SuffixDrafter(), FixedBudget(20, -1.0), 5, forests[0].roots)
    parts, budget = Parts.of(SuffixDrafter()), FixedBudget(20, -1.0)
    assert None not in parts.compiled
    grow_compiled(CompiledGrowth(library, 5), forests[1], parts, budget, 5, forests[1].roots, None)
    columns = [(f.tree, f.parent, f.token, f.depth, f.value) for f in forests]
    assert all((one == two).all() for one, two in zip(*columns, strict=True))
    assert forests[0].depth.max() > 2
