"""Laws of learning: it makes a head better on the texts that it sees, and serves no weights that draft worse."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from tests.heads import TOKENS, network
from tests.models import tiny
from worker.drafters.head_network import HeadNetwork
from worker.engine.model.loading import embeddings, output_weights
from worker.learning.head_trainer import HeadTrainer, LearningRecipe
from worker.learning.learning_loop import LearningLoop
from worker.learning.shared_memory import LearningText, RingShape, TextRing, anonymous_file

RECIPE = LearningRecipe(learning_rate=3e-3, texts=2, visits=2.0, unroll=2, held_out_every=4, min_held_out=2, updates=4)
MODEL = tiny("llama")
IDS = [2, 8, 4, 16, 32, 6] * 2  # a head of the tests proposes even tokens


class ScoredTrainer(HeadTrainer):
    """Does not train, and rates weights by the sum of one of them."""

    def update(self, texts: Sequence[LearningText]) -> float:
        self.set_score(next(self.scores))
        return 0.0

    def accepted(self, network: HeadNetwork, texts: Sequence[LearningText]) -> float:
        return float(network.model.norm.weight[0].detach())

    def set_score(self, score: float, network: HeadNetwork | None = None) -> None:
        with torch.no_grad():
            (network or self.network).model.norm.weight[0] = score

    scores: Iterator[float]


@pytest.fixture
def ring() -> Iterator[TextRing]:
    shape = RingShape.of(2 * 48, 48, torch.float32, 0)
    descriptor = anonymous_file(TextRing.size_of(shape))
    ring = TextRing(descriptor, shape)
    yield ring
    os.close(descriptor)


def fill(ring: TextRing, count: int) -> None:
    for _ in range(count):
        ring.append(IDS, 2, torch.ones(len(IDS) - 1, 2 * 48), embeddings(MODEL)[torch.tensor(IDS)])


def scored(ring: TextRing, *scores: float) -> LearningLoop:
    """Return a loop with original weights of score 1, whose trained weights have these scores after each comparison."""
    recipe = replace(RECIPE, updates=1, patience=2)
    trainer = ScoredTrainer(network(MODEL), output_weights(MODEL)[TOKENS], TOKENS, recipe)
    trainer.set_score(1.0)
    trainer.scores = iter(scores)
    fill(ring, 24)
    return LearningLoop(trainer, ring, recipe)


def score(loop: LearningLoop) -> float:
    return loop._trainer.accepted(loop.served, [])


def test_a_head_drafts_better_what_it_has_seen_and_then_waits_for_more(ring: TextRing) -> None:
    trainer = HeadTrainer(network(MODEL), output_weights(MODEL)[TOKENS], TOKENS, RECIPE)
    loop = LearningLoop(trainer, ring, RECIPE)
    assert loop.run_once() is None
    fill(ring, 16)
    text = ring.read(0)
    assert text is not None
    before = trainer.accepted(loop.served, [text])
    changes = 0
    while (changed := loop.run_once()) is not None:
        changes += changed
    assert changes >= 1
    assert trainer.accepted(loop.served, [text]) > before + 0.5
    assert ring.backlog == 0


def test_only_weights_that_gain_are_served(ring: TextRing) -> None:
    loop = scored(ring, 1.001, 0.9, 1.2, 1.1)
    assert [loop.run_once() for _ in range(4)] == [False, False, True, False]
    assert score(loop) == pytest.approx(1.2)


def test_training_returns_to_the_served_weights_when_it_only_loses(ring: TextRing) -> None:
    loop = scored(ring, 1.2, 1.1, 1.1)
    assert [loop.run_once() for _ in range(3)] == [True, False, False]
    assert loop._trainer.accepted(loop._trainer.network, []) == pytest.approx(1.2)


def test_the_original_weights_return_when_they_are_better_again(ring: TextRing) -> None:
    loop = scored(ring, 1.2, 1.0)
    assert loop.run_once()
    loop._trainer.set_score(0.5, loop.served)  # type: ignore[attr-defined]  # on the texts that came meanwhile
    assert loop.run_once()
    assert score(loop) == pytest.approx(1.0)


def test_held_out_texts_are_never_trained_on(ring: TextRing) -> None:
    fill(ring, 16)
    loop = scored(ring)
    numbers: set[int] = set()
    read = ring.read
    ring.read = lambda number: numbers.add(number) or read(number)  # type: ignore[method-assign, func-returns-value]
    for _ in range(40):
        loop._sample(ring.appended)
    assert numbers
    assert all(number % RECIPE.held_out_every != RECIPE.held_out_every - 1 for number in numbers)
