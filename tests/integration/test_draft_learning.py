"""The learning process of a draft: it trains beside an engine, and may be killed at any time."""

from __future__ import annotations

import os
import signal
import time

from tests.heads import TOKENS, network, packed_head, tapped
from tests.models import tiny
from tests.unit.worker.engine.harness import decode, engine, options, outputs, plain_texts, sequences
from worker.drafters.head import HeadDrafter
from worker.engine.model.loading import output_weights
from worker.engine.options import Mode
from worker.learning.head_learner import HeadLearner


def test_a_killed_learning_process_changes_neither_texts_nor_the_head() -> None:
    model = tiny("llama")
    output = output_weights(model)[TOKENS].clone()
    head = packed_head(model, network(model))
    target = tapped(model)
    assert target.hidden is not None
    learner = HeadLearner(head, network(model), output, threads=1)
    try:
        running = engine(target, HeadDrafter(head, target.hidden, "head", learner), options(Mode.PAPER))
        for _ in range(8):
            some = sequences()
            decode(running, some)
            assert outputs(some) == plain_texts()
        while learner.backlog:  # it reads and trains
            time.sleep(0.05)
        assert learner.pid is not None
        os.kill(learner.pid, signal.SIGKILL)  # raises if it has ended by itself
        while not learner.ended:
            time.sleep(0.05)
        swaps = []
        for _ in range(3):  # what it has published before it was killed is still swapped in
            some = sequences()
            decode(running, some)
            assert outputs(some) == plain_texts()
            swaps.append(learner.swaps)
        assert swaps[1] == swaps[2]
    finally:
        learner.close()
