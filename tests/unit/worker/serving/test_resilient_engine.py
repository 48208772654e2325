"""Recovery: a sequence that fails alone is given up, a batch that is too large shrinks, all others complete."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.models import TableModel
from tests.unit.worker.engine.harness import engine, options, outputs, sequences
from tests.unit.worker.engine.test_sharing import last_token
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.options import Mode
from worker.engine.segments import Segment
from worker.engine.sequence import Sequence as EngineSequence
from worker.serving.resilient_engine import ResilientEngine

POISON = 60


class FragileModel(TableModel):
    """A model that fails on too many rows, or on rows with a poisonous token."""

    limit: int = 1000
    failures: int = 0

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        if sum(len(s.ids) for s in segments) > self.limit or any(POISON in s.ids for s in segments):
            self.failures += 1
            raise RuntimeError("out of memory")
        return super().forward(segments)


def resilient(model: FragileModel, mode: Mode = Mode.PLAIN) -> ResilientEngine:
    chosen = options(mode, max_sequences=16, prefill_rows=100)
    return ResilientEngine(lambda: engine(model, SuffixDrafter(), chosen))


def decode(running: ResilientEngine, some: Sequence[EngineSequence]) -> list[EngineSequence]:
    """Run sequences to their end; return those that were given up."""
    for sequence in some:
        running.add(sequence)
    lost: list[EngineSequence] = []
    for _ in range(2000):
        if not running.busy:
            return lost
        lost += running.step()[1]
    raise AssertionError("still busy after 2000 steps")


@pytest.mark.parametrize("poisoned", [[0], [3], [15], [2, 3, 11], list(range(16))])
def test_poisonous_prompts_are_given_up_and_all_others_get_their_text(poisoned: list[int]) -> None:
    prompts = [[POISON if i in poisoned else 5, 2 + i] for i in range(16)]
    some, calm = sequences(prompts), sequences([[5, 2 + i] for i in range(16)])
    decode(resilient(FragileModel(last_token)), calm)
    lost = decode(resilient(FragileModel(last_token)), some)
    assert sorted(s.key for s in lost if isinstance(s.key, int)) == poisoned
    good = [i for i in range(16) if i not in poisoned]
    assert [some[i].output_ids for i in good] == [calm[i].output_ids for i in good]


def test_a_text_that_becomes_poisonous_is_given_up_with_what_it_had() -> None:
    some = sequences([[2 + i] for i in range(6)] + [[POISON - 5]], max_tokens=20)
    lost = decode(resilient(FragileModel(last_token)), some)
    assert lost == [some[6]]
    assert some[6].output_ids == list(range(POISON - 4, POISON + 1)), "it was drawn, and could not be read back"
    assert all(len(s.output_ids) == 20 for s in some[:6])


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.PAPER])
def test_a_batch_that_is_too_large_shrinks_and_no_sequence_is_lost(mode: Mode) -> None:
    some, calm = sequences([[2, 3 + i, 4] for i in range(16)]), sequences([[2, 3 + i, 4] for i in range(16)])
    decode(resilient(FragileModel(last_token), mode), calm)
    model = FragileModel(last_token)
    model.limit = 30
    assert decode(resilient(model, mode), some) == []
    assert outputs(some) == outputs(calm)
    assert model.failures


def test_free_capacity_is_zero_until_all_sequences_are_back_after_a_failure() -> None:
    model = FragileModel(last_token)
    model.limit = 5
    running = resilient(model)
    for sequence in sequences([[2], [3], [4], [5], [6], [7]], max_tokens=3):
        running.add(sequence)
    running.step()
    assert running.free_capacity == 0
    while running.busy:
        running.step()
    decode(running, sequences([[2]]))
    assert running.free_capacity == 16


def test_a_sequence_that_waits_after_a_failure_can_be_cancelled() -> None:
    model = FragileModel(last_token)
    model.limit = 2
    running = resilient(model)
    some = sequences([[2], [3], [4]])
    for sequence in some:
        running.add(sequence)
    running.step()
    running.cancel({0, 1, 2})
    assert not running.busy
    assert outputs(some) == [[], [], []]


def test_nan_logits_of_one_sequence_end_that_sequence_alone() -> None:
    def law(prefix: tuple[int, ...]) -> Tensor:
        return last_token(prefix) * (float("nan") if 40 in prefix and len(prefix) > 6 else 1.0)

    some, calm = sequences([[2 + i, 3] for i in range(5)] + [[2, 40]]), sequences([[2 + i, 3] for i in range(5)])
    decode(resilient(FragileModel(last_token)), calm)
    model = FragileModel(law)
    assert decode(resilient(model), some) == [some[5]]
    assert "NaN" in some[5].failure
    assert outputs(some[:5]) == outputs(calm)


def test_nan_logits_of_all_sequences_are_retried_one_by_one() -> None:
    failures = iter([True, True])

    def law(prefix: tuple[int, ...]) -> Tensor:
        return last_token(prefix) * (float("nan") if len(prefix) > 6 and next(failures, False) else 1.0)

    some, calm = sequences([[2, 3], [4, 5]]), sequences([[2, 3], [4, 5]])
    decode(resilient(FragileModel(last_token)), calm)
    assert decode(resilient(FragileModel(law)), some) == []
    assert outputs(some) == outputs(calm)


def test_a_sequence_that_the_engine_rejects_is_given_up_and_the_others_are_decoded() -> None:
    some = sequences([[2, 3], [5] * 300, [4, 5]])
    assert decode(resilient(FragileModel(last_token)), some) == [some[1]]
    assert all(len(some[i].output_ids) == some[i].max_tokens for i in (0, 2))


def test_a_device_error_is_not_blamed_on_a_sequence() -> None:
    class Broken(FragileModel):
        def forward(self, segments: Sequence[Segment]) -> Tensor:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        decode(resilient(Broken(last_token)), sequences([[2, 3]]))
