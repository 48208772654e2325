"""Laws of a head that learns: texts stay those of plain decoding, and damage changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.heads import TOKENS, network, packed_head, tapped
from tests.models import tiny
from tests.unit.worker.engine.harness import (
    decode,
    engine,
    greedy_and_sampled,
    options,
    outputs,
    plain_texts,
    sequences,
)
from worker.drafters.head import HeadDrafter, PackedHead
from worker.drafters.head_network import HeadNetwork
from worker.drafters.mixed import MixedDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.model.loading import output_weights
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import chain
from worker.learning import head_learner
from worker.learning.head_learner import HeadLearner

IDS = [5, 9, 2, 7, 7, 30]


class SilentProcess:
    """Stands in for the learning process, which does nothing."""

    pid, status = 1, None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.returncode = None

    def poll(self) -> int | None:
        return self.status

    def kill(self) -> None:
        self.status = -9

    def wait(self) -> int:
        return -9


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> tuple[PackedModel, PackedHead, HeadLearner]:
    monkeypatch.setattr(head_learner, "launch", SilentProcess)
    model = tiny("llama")
    output = output_weights(model)[TOKENS].clone()
    head = packed_head(model, network(model))
    return tapped(model), head, HeadLearner(head, network(model), output, threads=1)


def weights_of(other: HeadNetwork) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in other.state_dict().items()}


@pytest.mark.parametrize(("cpu_kernels", "paged"), [(True, None), (False, None), (False, True)])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_head_that_gets_other_weights_computes_what_a_head_made_of_them_does(
    layers: int, cpu_kernels: bool, paged: bool | None
) -> None:
    model = tiny("llama")
    changed, made = (
        packed_head(model, network(model, layers, seed), cpu_kernels=cpu_kernels, paged=paged) for seed in (0, 1)
    )
    changed.load(weights_of(network(model, layers, 1)))
    hidden = torch.randn(len(IDS), 2 * 48)
    answers = [head.forward([chain(0, 0, IDS, keep_last=True)], head.states(hidden)) for head in (changed, made)]
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs)


def test_texts_are_those_of_plain_decoding_while_weights_are_swapped(
    learning: tuple[PackedModel, PackedHead, HeadLearner],
) -> None:
    target, head, learner = learning
    assert target.hidden is not None
    drafter = MixedDrafter(HeadDrafter(head, target.hidden, "head", learner), SuffixDrafter())
    running = engine(target, drafter, options(Mode.PAPER))
    decode(running, sequences())  # the first texts start the process
    assert learner._process is not None
    others = [weights_of(network(tiny("llama"), seed=seed)) for seed in (1, 2)]
    sampling = Sampling(temperature=0.8)
    some = greedy_and_sampled(sampling)
    for sequence in some:
        running.add(sequence)
    while running.busy:
        others.reverse()
        learner._process.weights.write(others[0])
        running.step()
    assert learner.swaps > 2
    assert outputs(some) == plain_texts(sampling=sampling, both=True)


def test_finished_texts_and_their_states_are_handed_over(
    learning: tuple[PackedModel, PackedHead, HeadLearner],
) -> None:
    target, head, learner = learning
    assert target.hidden is not None
    some = sequences()
    decode(engine(target, HeadDrafter(head, target.hidden, "head", learner), options(Mode.PAPER)), some)
    assert learner._process is not None
    ring = learner._process.ring
    assert ring.appended == len(some)
    read = [text for text in map(ring.read, range(ring.appended)) if text is not None]
    assert sorted(text.ids.tolist() for text in read) == sorted(sequence.ids for sequence in some)
    alone = tapped(tiny("llama"))
    assert alone.hidden is not None
    for text in read:
        ids = text.ids.tolist()
        alone.forward([chain(0, 0, ids, keep_last=True)])
        torch.testing.assert_close(text.states[:-1], alone.hidden.read(0, 0, len(ids) - 1), rtol=1e-4, atol=1e-4)
        assert text.num_prompt == next(s for s in some if s.ids == ids).num_prompt


def test_damaged_weights_and_a_dead_process_leave_the_head_as_it_was(
    learning: tuple[PackedModel, PackedHead, HeadLearner],
) -> None:
    target, head, learner = learning
    assert target.hidden is not None
    drafter = HeadDrafter(head, target.hidden, "head", learner)
    decode(engine(target, drafter, options(Mode.PAPER)), sequences())
    process = learner._process
    assert process is not None
    process.weights.write(weights_of(network(tiny("llama"), seed=5)))
    process.weights._memory[200] ^= 0x40
    some = sequences()
    before = decode(engine(target, drafter, options(Mode.PAPER)), some)
    assert learner.swaps == 0
    process.kill()
    again = sequences()
    after = decode(engine(target, drafter, options(Mode.PAPER)), again)
    appended = process.ring.appended
    last = decode(engine(target, drafter, options(Mode.PAPER)), sequences())
    assert process.ring.appended == appended
    assert outputs(some) == outputs(again) == plain_texts()
    accepted = [[r.stats.accepted_tokens for r in results] for results in (before, after, last)]
    assert accepted[0] == accepted[1] == accepted[2]
