"""Calibration: a few seconds of real steps at start-up, so that rows are priced in this machine's milliseconds.

Runs the loaded target over rows and contexts; the result is the `CostModel` that every engine starts with. It is kept
on disk, by everything that changes it: the steps of jobs then correct it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from worker.engine.cost_model import CostModel
from worker.engine.language_model import LanguageModel
from worker.engine.rows import Segment, chain

log = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_SHORT, _LONG = 32, 1024  # tokens of context in front of what is timed
_LONG_ROWS = 16
_ROUNDS = 4


def calibrate(target: LanguageModel, capacity: int, key: Sequence[object], folder: Path) -> CostModel:
    """Return the costs of a target with `capacity` KV entries a slot.

    They come from `folder`, if they were measured under the same `key`, and else are measured now and kept there.
    """
    file = folder / f"{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:16]}.json"
    try:
        return CostModel.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError):
        costs = measure(target, capacity)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**costs.as_json(), "key": [str(part) for part in key]}, indent=1))
    except OSError as error:
        log.warning("The calibration can't be kept: %s", error, extra={"action": "calibration"})
    return costs


def measure(target: LanguageModel, capacity: int) -> CostModel:
    """Measure forwards, each as the fastest of a few rounds: what is slower is the machine's noise."""
    short, long = min(_SHORT, capacity // 4), min(_LONG, capacity - _LONG_ROWS)
    target.forward([chain(0, 0, [0] * long, keep_last=True)])
    sizes = [(rows, short) for rows in _ROWS if short + rows <= capacity] + [(_LONG_ROWS, long)]
    fastest = dict.fromkeys(sizes, float("inf"))
    for _ in range(_ROUNDS):  # round by round, so that a slow moment hits every size and bends no curve
        for rows, context in sizes:
            started = perf_counter()
            target.forward([_tree_rows(rows, context)])[0, 0].item()  # a GPU is done when its numbers are here
            fastest[rows, context] = min(fastest[rows, context], (perf_counter() - started) * 1e3)
    target.release(0, 0)
    more = fastest[_LONG_ROWS, long] - fastest[_LONG_ROWS, short]
    entry_ms = max(more, 0.0) / (_LONG_ROWS * max(long - short, 1))
    return CostModel(
        {rows: ms - rows * short * entry_ms for (rows, at), ms in fastest.items() if at == short}, entry_ms
    )


def _tree_rows(rows: int, context: int) -> Segment:
    """Siblings behind a context with logits for each, as a wide draft tree has."""
    at = np.full(rows, context)
    return Segment(0, context, context, np.zeros(rows, np.int64), at, np.eye(rows, dtype=np.bool_), np.arange(rows))
