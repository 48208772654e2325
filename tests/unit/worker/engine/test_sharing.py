"""Laws of prefix sharing: a common prefix is prefilled once, and that changes no text."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.models import ARCHITECTURES, VOCAB, TableModel, packed, tiny
from tests.unit.worker.engine.harness import (
    decode,
    drafter,
    engine,
    greedy_and_sampled,
    options,
    outputs,
    sequences,
    shared_target,
)
from worker.engine import prefix_sharing
from worker.engine.errors import NanLogits
from worker.engine.kv.prefix_tree import Match, PrefixTree, common_prefix_length
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import TokenIds

SYSTEM = [2 + i % 37 for i in range(40)]
PROMPTS = [[*SYSTEM, 7, 8], [*SYSTEM, 9], [*SYSTEM[:25], 11, 12, 13], [*SYSTEM, 7, 8], [20, 21], SYSTEM]
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.95)


def last_token(text: tuple[int, ...]) -> Tensor:
    logits = torch.zeros(VOCAB)
    logits[(text[-1] + 1) % VOCAB] = 5.0
    return logits


@pytest.fixture
def no_sharing(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(prefix_sharing, "MIN_SHARED_PREFIX", 10_000)
    return monkeypatch


@cache
def texts_without_sharing(architecture: str) -> list[list[int]]:
    """Decode all prompts while no prefix is shared; call it under `no_sharing`."""
    alone = greedy_and_sampled(SAMPLED, PROMPTS, 5)
    decode(engine(shared_target(architecture), None, options(Mode.PLAIN, prefill_rows=64)), alone)
    return outputs(alone)


# Each architecture with two of the four pairs, all four among them; `make long` has the others.
PAIRS = [((17, True), (500, False)), ((17, False), (500, True))]


@pytest.mark.parametrize(
    ("architecture", "prefill_rows", "cpu_kernels"),
    [(name, *pair) for number, name in enumerate(ARCHITECTURES) for pair in PAIRS[number % 2]]
    + [
        pytest.param(name, *pair, marks=pytest.mark.long)
        for number, name in enumerate(ARCHITECTURES)
        for pair in PAIRS[1 - number % 2]
    ],
)
def test_text_is_the_same_with_and_without_sharing(
    no_sharing: pytest.MonkeyPatch, architecture: str, prefill_rows: int, cpu_kernels: bool
) -> None:
    alone = texts_without_sharing(architecture)
    draft = drafter("same")
    if not cpu_kernels:
        no_sharing.setattr("worker.engine.model.backend.kernels", lambda dtype: None)
    no_sharing.setattr(prefix_sharing, "MIN_SHARED_PREFIX", 16)
    together = greedy_and_sampled(SAMPLED, PROMPTS, 5)
    chosen = options(Mode.PAPER, prefill_rows=prefill_rows, max_sequences=len(PROMPTS))
    running = engine(packed(tiny(architecture), slots=len(PROMPTS)), draft, chosen)
    decode(running, together)
    assert outputs(together) == alone
    again = greedy_and_sampled(SAMPLED, PROMPTS, 5)
    decode(running, again)  # now from slots whose texts have ended
    assert outputs(again) == alone


@pytest.mark.parametrize("prefill_rows", [7, 500])
def test_eight_choices_of_one_prompt_read_it_once(prefill_rows: int) -> None:
    model = TableModel(last_token)
    decode(
        engine(model, None, options(Mode.PLAIN, max_sequences=8, prefill_rows=prefill_rows)),
        sequences([PROMPTS[0]] * 8, max_tokens=1),
    )
    assert model.rows == len(PROMPTS[0]) + 7


def test_five_prompts_read_their_common_system_prompt_once() -> None:
    model = TableModel(last_token)
    prompts = [[*SYSTEM, 5 + i, 6, 7] for i in range(5)]
    decode(engine(model, None, options(Mode.PLAIN, max_sequences=5)), sequences(prompts, max_tokens=1))
    assert model.rows == len(SYSTEM) + 5 * 3


def test_a_prompt_that_comes_later_shares_with_one_that_runs_and_with_one_that_has_ended() -> None:
    model = TableModel(last_token)
    running = engine(model, None, options(Mode.PLAIN))
    first, second, third = sequences([PROMPTS[0]] * 3, max_tokens=3)
    running.add(first)
    while first.steps == 0:
        running.step()
    decode(running, [second])
    decode(running, [third])
    assert model.rows == len(PROMPTS[0]) + 2 + 2 * 3


def test_a_sequence_starts_in_the_slot_that_holds_its_prefix() -> None:
    model = TableModel(last_token)
    running = engine(model, None, options(Mode.PLAIN, max_sequences=1))
    decode(running, sequences([PROMPTS[0]], max_tokens=1))
    decode(running, sequences([PROMPTS[1]], max_tokens=1))
    assert model.rows == len(PROMPTS[0]) + 1


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_freed_slot_that_was_overwritten_is_shared_no_more(forgotten: bool) -> None:
    model = packed(tiny())
    running = engine(model, None, options(Mode.PLAIN))
    first, second = sequences([PROMPTS[0]] * 2)
    decode(running, [first])
    model.kv.poison(first.slot)
    if forgotten:
        running.forget(first.slot)
    # the control: poison without a `forget` leaves no token to draw, so these slots are really shared
    with nullcontext() if forgotten else pytest.raises(NanLogits):
        decode(running, [second])
    assert (outputs([second]) == outputs([first])) is forgotten


def test_a_sequence_cancelled_before_it_read_anything_leaves_the_others_alone() -> None:
    model = TableModel(last_token)
    running = engine(model, None, options(Mode.PLAIN))
    some = sequences([PROMPTS[0]] * 3, max_tokens=4)
    for sequence in some:
        running.add(sequence)
    running.step()
    running.cancel({0})  # the one that the others wait for
    while running.busy:
        running.step()
    assert outputs(some)[1] == outputs(some)[2] == [9, 10, 11, 12]


@pytest.mark.parametrize("prompt_of", [lambda i: [*SYSTEM, 5 + i % 3, *[9 + i] * 40], lambda i: [*SYSTEM, 9 + i, 3]])
def test_a_prompt_is_looked_up_as_often_among_many_that_wait_as_among_few(
    monkeypatch: pytest.MonkeyPatch, prompt_of: Callable[[int], list[int]]
) -> None:
    lookups: list[int] = []
    longest = PrefixTree.longest

    def counted(
        tree: PrefixTree[Hashable], ids: TokenIds, end: int, like: tuple[Hashable, int] | None = None
    ) -> Match[Hashable]:
        found = longest(tree, ids, end, like)
        lookups.append(len(found.ends))
        return found

    monkeypatch.setattr(PrefixTree, "longest", counted)
    for count in (4, 40):
        lookups.clear()
        prompts = [prompt_of(i) for i in range(count)]
        running = engine(TableModel(last_token), None, options(Mode.PLAIN, max_sequences=count, prefill_rows=50))
        decode(running, sequences(prompts, max_tokens=2))
        assert len(lookups) <= 4 * count, "when it gets its first rows, and when the prefix is there"
        assert sum(lookups) <= count, "a prompt compares itself with none of those that wait for the same prefix"


def test_a_prompt_that_goes_on_as_a_running_output_does_shares_it() -> None:
    model = TableModel(last_token)
    running = engine(model, None, options(Mode.PLAIN))
    first = sequences([PROMPTS[0]], max_tokens=30)[0]
    running.add(first)
    while len(first.output_ids) < 12:
        running.step()
    second = sequences([[*first.ids[:-2], 3]], max_tokens=1)[0]
    running.add(second)
    rows = model.rows
    while not second.finished:
        running.step()
        rows += not first.finished
    assert model.rows == rows + 1


def test_a_short_prompt_gets_a_long_ones_prefix_read_before_the_rest_of_it() -> None:
    oldest, long, short = sequences([[50] * 300, [*SYSTEM, *[7] * 400], [*SYSTEM, 9]], max_tokens=1)
    running = engine(TableModel(last_token), None, options(Mode.PLAIN, max_context=500, prefill_rows=40))
    for sequence in (oldest, long):
        running.add(sequence)
    running.step()
    running.add(short)
    for _ in range(3):
        running.step()
    assert short.finished
    assert not long.finished


@pytest.mark.parametrize(
    ("ids", "others", "length"), [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0)]
)
def test_common_prefixes_are_measured(ids: list[int], others: list[int], length: int) -> None:
    a, b = array("i", ids), array("i", others)
    assert common_prefix_length(a, b) == common_prefix_length(b, a) == length
