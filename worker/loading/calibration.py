"""Calibration: a few seconds of real steps at start-up, so that rows and drafts are priced in ms of this machine.

Runs the loaded target over rows and contexts, and its drafter over texts; the result is the `CostModel` and the
`DraftTimes` that every engine starts with. They are kept on disk, by everything that changes them: the steps of jobs
then correct them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from worker.engine.model.packed_model import LanguageModel
from worker.engine.sampling.sampling import Sampling
from worker.engine.segments import Segment, chain
from worker.engine.sequence import Sequence as Text
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftTimes
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.drafting import Drafter

log = logging.getLogger(__name__)

_Measured = TypeVar("_Measured")

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_SHORT, _LONG = 32, 1024  # tokens of context in front of what is timed
_LONG_ROWS = 16
_ROUNDS = 4
_TEXTS = (1, 2, 4, 8, 16, 32)  # that a drafter is timed on
_TEXT_TOKENS = 64
_WORDS = 32  # different tokens of such a text


def calibrate(target: LanguageModel, capacity: int, key: Sequence[object], folder: Path) -> CostModel:
    """Return the costs of a target with `capacity` KV entries a slot.

    They come from `folder`, if they were measured under the same `key`, and else are measured now and kept there.
    """
    return _kept(folder, key, CostModel.from_json, lambda: measure(target, capacity), CostModel.as_json)


def calibrate_drafts(
    drafter: Drafter,
    slots: int,
    capacity: int,
    key: Sequence[object],
    folder: Path,
    clock: Callable[[], float] = perf_counter,
) -> DraftTimes:
    """Return the times of a drafter with `slots` KV slots of `capacity` entries; kept like those of the target."""
    measured = partial(measure_drafts, drafter, slots, capacity, clock)
    return _kept(folder, key, DraftTimes.from_json, measured, DraftTimes.as_json)


def _kept(
    folder: Path,
    key: Sequence[object],
    read: Callable[[Mapping[str, Any]], _Measured],
    measured: Callable[[], _Measured],
    written: Callable[[_Measured], dict[str, Any]],
) -> _Measured:
    """Return what was measured under a key earlier, or is now."""
    file = folder / f"{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:16]}.json"
    try:
        return read(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError):
        found = measured()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**written(found), "key": [str(part) for part in key]}, indent=1))
    except OSError as error:
        log.warning("The calibration can't be kept: %s", error, extra={"action": "calibration"})
    return found


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
    target.truncate(0, 0)
    more = fastest[_LONG_ROWS, long] - fastest[_LONG_ROWS, short]
    entry_ms = max(more, 0.0) / (_LONG_ROWS * max(long - short, 1))
    return CostModel(
        {rows: ms - rows * short * entry_ms for (rows, at), ms in fastest.items() if at == short}, entry_ms
    )


def _tree_rows(rows: int, context: int) -> Segment:
    """Siblings behind a context with logits for each, as a wide draft tree has."""
    at = np.full(rows, context)
    return Segment(0, context, context, np.zeros(rows, np.int64), at, np.eye(rows, dtype=np.bool_), np.arange(rows))


def measure_drafts(
    drafter: Drafter, slots: int, capacity: int, clock: Callable[[], float] = perf_counter
) -> DraftTimes:
    """Measure layers, and the reading before the first of them, each as the fastest of a few rounds.

    `clock` returns seconds.
    """
    length = min(_TEXT_TOKENS, capacity // 4)
    layer_ms = {count: float("inf") for count in _TEXTS if count <= slots}
    row_ms = float("inf")
    for _ in range(_ROUNDS):
        for count in layer_ms:
            texts = [_text(slot, length) for slot in range(count)]
            reading_ms = _layer_ms(drafter, texts, clock)
            usual_ms = _layer_ms(drafter, texts, clock)
            for text in texts:
                drafter.drop(text)
            layer_ms[count] = min(layer_ms[count], usual_ms)
            row_ms = min(row_ms, max(reading_ms - usual_ms, 0.0) / (count * length))
    return DraftTimes(layer_ms, row_ms)


def _text(slot: int, length: int) -> Text:
    """Return a text that repeats itself, unlike those of other slots."""
    ids = [(slot + place) % _WORDS for place in range(length)]
    return Text(key=slot, ids=ids, num_prompt=length, max_tokens=length, sampling=Sampling(), slot=slot)


def _layer_ms(drafter: Drafter, texts: list[Text], clock: Callable[[], float]) -> float:
    """Draft a layer for every text, and let one token be written behind it."""
    forest = Forest(texts)
    started = clock()
    drafter.expand(forest, forest.roots)
    ms = (clock() - started) * 1e3
    for tree, text in enumerate(texts):
        text.ids.append((text.ids[-1] + 1) % _WORDS)
        drafter.commit(forest, tree, forest.roots[:0], text.ids[-1:])
    return ms
