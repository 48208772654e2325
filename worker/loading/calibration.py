"""Calibrate at start-up: measure step and draft times on this machine, in ms, for a few seconds.

The results, a `CostModel` of the target and `DraftTimes` of the drafter, are the engine's first estimates; the steps of
jobs then correct them. They are cached on disk under a key of everything that changes them, unless other programs
disturbed the measurement: sizes that look too dear are never used, so steps would not correct them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from worker.engine.model.packed_model import LanguageModel
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import Segment, chain
from worker.engine.sequence import Sequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftTimes
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.drafting import Drafter

log = logging.getLogger(__name__)

_Measured = TypeVar("_Measured")
Turns = Callable[[], AbstractContextManager[None]]  # a block in which no other model uses the device

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_SHORT_CONTEXT, _LONG_CONTEXT = 32, 1024  # tokens in the KV cache before the timed rows
_LONG_ROWS = 16  # rows per step at _LONG_CONTEXT
_MIN_ROUNDS, _MAX_ROUNDS = 4, 12  # of all sizes
# Share, and ms, by which a time must fall below the fastest before: then the machine was disturbed until now.
_CLEARLY_FASTER, _CLEARLY_FASTER_MS = 0.05, 0.1
_DRAFT_BATCHES = (1, 2, 4, 8, 16, 32)  # sequences per timed draft layer
_PROMPT_TOKENS = 64
_DISTINCT_TOKENS = 32  # in a prompt; it repeats, so that the suffix index finds drafts


def calibrate(
    target: LanguageModel,
    capacity: int,
    key: Seq[object],
    folder: Path,
    clock: Callable[[], float] = perf_counter,
    turn: Turns = nullcontext,
) -> CostModel:
    """Return the cost model of a target with `capacity` KV entries per slot.

    Read it from the cache in `folder` if `key` matches; else measure and cache it. `clock` returns seconds. Each round
    of measurements is one `turn` on the device.
    """
    run = partial(measure, target, capacity, clock, turn)
    return _cached(folder, key, CostModel.from_json, run, CostModel.as_json)


def calibrate_drafts(
    drafter: Drafter,
    slots: int,
    capacity: int,
    key: Seq[object],
    folder: Path,
    clock: Callable[[], float] = perf_counter,
    turn: Turns = nullcontext,
) -> DraftTimes:
    """Return the times of a drafter with `slots` KV slots of `capacity` entries, cached like the target's."""
    run = partial(measure_drafts, drafter, slots, capacity, clock, turn)
    return _cached(folder, key, DraftTimes.from_json, run, DraftTimes.as_json)


def _cached(
    folder: Path,
    key: Seq[object],
    read: Callable[[Mapping[str, Any]], _Measured],
    run: Callable[[], tuple[_Measured, bool]],
    as_json: Callable[[_Measured], dict[str, Any]],
) -> _Measured:
    """Return the cached measurement of a key, or run it, and cache it if it has settled."""
    file = folder / f"{hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:16]}.json"
    try:
        return read(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError):
        measured, settled = run()
    if not settled:
        log.warning(
            "Other programs disturbed the calibration: draft trees may have the wrong size. "
            "The next start measures again",
            extra={"action": "calibration"},
        )
        return measured
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**as_json(measured), "key": [str(part) for part in key]}, indent=1))
    except OSError as error:
        log.warning("Can't write the calibration cache: %s", error, extra={"action": "calibration"})
    return measured


def _rounds(run: Callable[[], bool], turn: Turns) -> bool:
    """Measure in rounds until one finds nothing clearly faster; return whether that came in `_MAX_ROUNDS`.

    `run` measures each size once, in a `turn` of its own, and returns whether any was clearly faster than before.
    """

    def run_alone() -> bool:
        with turn():
            return run()

    return any(not run_alone() and number >= _MIN_ROUNDS for number in range(1, _MAX_ROUNDS + 1))


def measure(
    target: LanguageModel, capacity: int, clock: Callable[[], float] = perf_counter, turn: Turns = nullcontext
) -> tuple[CostModel, bool]:
    """Measure forwards, and return whether the times have settled.

    Take the fastest of several rounds, as slower ones are noise of the machine.
    """
    short, long = min(_SHORT_CONTEXT, capacity // 4), min(_LONG_CONTEXT, capacity - _LONG_ROWS)
    target.forward([chain(0, 0, [0] * long, keep_last=True)])
    sizes = [(rows, short) for rows in _ROWS if short + rows <= capacity] + [(_LONG_ROWS, long)]
    fastest = dict.fromkeys(sizes, float("inf"))

    def run() -> bool:  # all sizes: a slow moment then affects them alike
        before = dict(fastest)
        for rows, context in sizes:
            started = clock()
            target.forward([_tree_rows(rows, context)])[0, 0].item()  # .item() waits for a GPU
            fastest[rows, context] = min(fastest[rows, context], (clock() - started) * 1e3)
        return _clearly_faster(before, fastest)

    settled = _rounds(run, turn)
    target.truncate(0, 0)
    more = fastest[_LONG_ROWS, long] - fastest[_LONG_ROWS, short]
    entry_ms = max(more, 0.0) / (_LONG_ROWS * max(long - short, 1))
    times = {rows: ms - rows * short * entry_ms for (rows, at), ms in fastest.items() if at == short}
    return CostModel(times, entry_ms), settled


def _clearly_faster(before: Mapping[Any, float], after: Mapping[Any, float]) -> bool:
    return any(before[n] - after[n] > max(_CLEARLY_FASTER * after[n], _CLEARLY_FASTER_MS) for n in after)


def _tree_rows(rows: int, context: int) -> Segment:
    """Return a wide draft tree: siblings after a context, with logits for each."""
    at = np.full(rows, context)
    return Segment(0, context, context, np.zeros(rows, np.int64), at, np.eye(rows, dtype=np.bool_), np.arange(rows))


def measure_drafts(
    drafter: Drafter,
    slots: int,
    capacity: int,
    clock: Callable[[], float] = perf_counter,
    turn: Turns = nullcontext,
) -> tuple[DraftTimes, bool]:
    """Measure the first draft layer and a further one per batch size, and the catch-up cost per uncached token.

    Return whether the times have settled too. Take the fastest of several rounds. `clock` returns seconds.
    """
    length = min(_PROMPT_TOKENS, capacity // 4)
    first_ms = {count: float("inf") for count in _DRAFT_BATCHES if count <= slots}
    further_ms, reading_ms = dict(first_ms), dict(first_ms)

    def run() -> bool:
        before = first_ms | {-count: ms for count, ms in further_ms.items()}
        for count in first_ms:
            sequences = [_sequence(slot, length) for slot in range(count)]
            catch_up_ms, _ = _layers_ms(drafter, sequences, clock)  # reads the prompts first
            usual_ms, next_ms = _layers_ms(drafter, sequences, clock)
            for sequence in sequences:
                drafter.drop(sequence)
            first_ms[count] = min(first_ms[count], usual_ms)
            further_ms[count] = min(further_ms[count], next_ms)
            reading_ms[count] = min(reading_ms[count], catch_up_ms)
        return _clearly_faster(before, first_ms | {-count: ms for count, ms in further_ms.items()})

    settled = _rounds(run, turn)
    most = max(first_ms)
    # Of the fastest times, not the least difference of a round: in a disturbed one the reading would seem free.
    row_ms = max(reading_ms[most] - first_ms[most], 0.0) / (most * length)
    return DraftTimes(first_ms, further_ms, row_ms), settled


def _sequence(slot: int, length: int) -> Sequence:
    """Return a sequence whose prompt repeats itself and differs from those of other slots."""
    ids = [(slot + position) % _DISTINCT_TOKENS for position in range(length)]
    return Sequence(key=slot, ids=ids, num_prompt=length, max_tokens=length, sampling=Sampling(), slot=slot)


def _layers_ms(drafter: Drafter, sequences: list[Sequence], clock: Callable[[], float]) -> tuple[float, float]:
    """Time the first two draft layers, each of a node per sequence, then append a token to each.

    Without candidates for a second layer, its time counts as that of the first.
    """
    forest = Forest(sequences)
    started = clock()
    offered = drafter.expand(forest, forest.roots)
    first_ms = further_ms = (clock() - started) * 1e3
    best = offered.probabilities.argmax(axis=1)[:, None]
    only = replace(
        offered,
        tokens=np.take_along_axis(offered.tokens, best, axis=1),
        probabilities=np.take_along_axis(offered.probabilities, best, axis=1),
        source=None,
    )
    nodes = forest.add_layer(forest.roots, only)
    if len(nodes) == len(sequences):
        started = clock()
        drafter.expand(forest, nodes)
        further_ms = (clock() - started) * 1e3
    for tree, sequence in enumerate(sequences):
        sequence.ids.append((sequence.ids[-1] + 1) % _DISTINCT_TOKENS)
        drafter.commit(forest, tree, forest.roots[:0], sequence.ids[-1:])
    return first_ms, further_ms
