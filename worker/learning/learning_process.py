"""The learning process of a worker: it trains a head at the lowest priority.

    python -P -m worker.learning.learning_process TASK

`HeadLearner` starts it. It ends with its parent, and nothing else depends on it: it may be killed at any time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

from jobs.processes import parent_death_hook
from worker.drafters.head_network import HeadNetwork, HeadShape
from worker.learning.head_trainer import OUTPUT, TOKENS, HeadTrainer, LearningRecipe
from worker.learning.learning_loop import LearningLoop
from worker.learning.shared_memory import RingShape, SharedTensors, TextRing

_NICENESS = 19  # the engine's threads come first
_IDLE_S = 0.2  # between two looks for new texts


def main(arguments: list[str]) -> int:
    """Train on the texts of the parent until it ends."""
    task = json.loads(arguments[0])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of the terminal: the parent decides when this process ends
    die_with_parent = parent_death_hook(task["parent"])
    if die_with_parent is not None:
        die_with_parent()
    os.nice(_NICENESS)
    torch.set_num_threads(task["threads"])
    ring_file, given_file, weights_file = task["files"]
    ring = TextRing(ring_file, RingShape(**task["ring"]))
    given, weights = SharedTensors(given_file).read(), SharedTensors(weights_file)
    output, tokens = given.pop(OUTPUT), given.pop(TOKENS)
    network = HeadNetwork(HeadShape(**task["shape"]))
    network.load_state_dict(given)
    recipe = LearningRecipe()
    loop = LearningLoop(HeadTrainer(network, output, tokens, recipe), ring, recipe)
    while os.getppid() == task["parent"]:
        swapped = loop.run_once()
        if swapped:
            weights.write(
                {name: weight.to(ring.shape.torch_dtype) for name, weight in loop.served.state_dict().items()}
            )
        elif swapped is None:
            time.sleep(_IDLE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
