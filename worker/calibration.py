"""Calibration: a few seconds of real steps at start-up, so that trees are priced in this machine's milliseconds.

Runs the loaded target over rows and over batch sizes; the result is the `CostModel` every job starts with.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import numpy as np

from worker.engine.cost_model import CostModel
from worker.engine.engine import Engine
from worker.engine.language_model import LanguageModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.rows import Segment, chain
from worker.engine.sampling import Sampling
from worker.engine.sequence import Sequence

_ROWS = (1, 2, 4, 8, 16, 32, 64)
_PREFIX = 64  # tokens of context in front of what is timed
_ROUNDS = 6


def calibrate(target: LanguageModel, options: EngineOptions) -> CostModel:
    """Measure forwards over rows and plain steps over batch sizes, each as the fastest of a few.

    What is slower is the machine's noise; plain steps of jobs will say how far the machine is off.
    """
    most = min(options.max_sequences, max(1, options.total_kv_tokens // (_PREFIX + _ROUNDS + options.nodes + 2)))
    sizes = [2**i for i in range(most.bit_length())]
    plain_options = replace(options, mode=Mode.PLAIN)
    plain = {size: _plain_step_ms(Engine(target, None, plain_options), size) for size in sizes}
    return CostModel(_verify_ms(target), plain)


def _verify_ms(target: LanguageModel) -> dict[int, float]:
    """Time forwards round by round, so that a slow moment of the machine hits every size and bends no curve."""
    target.forward([chain(0, 0, [0] * _PREFIX, keep_last=True)])
    fastest = dict.fromkeys(_ROWS, float("inf"))
    for _ in range(_ROUNDS):
        for rows in _ROWS:
            started = perf_counter()
            target.forward([_tree_rows(rows)])
            fastest[rows] = min(fastest[rows], (perf_counter() - started) * 1e3)
    return fastest


def _tree_rows(rows: int) -> Segment:
    """Rows behind the prefix with logits for each, as a draft tree has."""
    places = np.arange(rows)
    return Segment(0, _PREFIX, _PREFIX, np.zeros(rows, np.int64), _PREFIX + places, None, places)


def _plain_step_ms(engine: Engine, sequences: int) -> float:
    for key in range(sequences):
        engine.add(Sequence(key, [0] * _PREFIX, _PREFIX, _ROUNDS + 1, Sampling()))
    samples = []
    while engine.busy:
        samples += [
            r.numbers.step_ms for r in engine.step() if r.numbers.step and r.numbers.batch_sequences == sequences
        ]
    return min(samples)
