"""CPU time of the engine's thread for prompts that arrive at once, from their message until all have been prefilled.

The target computes nothing. Sequences decode beside the prompts that are still prefilled; the time that this takes
alone is measured, too, and is not counted.
"""

from __future__ import annotations

import gc
import pickle
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import thread_time

import numpy as np

from worker.engine.batch import Batch
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence as EngineSequence

KINDS = {"different": 0, "100 in common": 100, "200 in common": 200, "all but 2 in common": 298, "equal": 300}
_PROMPT_TOKENS = 300
_MAX_TOKENS = 1000
_PREFILL_ROWS = 512  # of a step
_PAGE = 64  # KV entries
_VOCABULARY = 49_152
_DRAWN, _EOS = 5, 2  # the token that the target draws, and one that it never draws


@dataclass(frozen=True, slots=True)
class ArrivalCosts:
    """CPU time for all arrivals together, in ms: medians of the runs, and the best one's."""

    arrivals: int
    prompts: str  # what they have in common
    runs: int
    steps: int  # until all have been prefilled
    receive_ms: float  # their message becomes sequences
    queue_ms: float
    schedule_ms: float  # of all steps, without what decoding alone takes
    first_step_ms: float  # part of it
    admission_ms: float  # queue and schedule
    admission_best_ms: float
    all_ms: float  # admission and receiving


@dataclass(frozen=True, slots=True)
class _Run:
    steps: int
    receive_s: float
    queue_s: float
    schedule_s: float
    first_step_s: float


def measure_arrivals(arrivals: int, kind: str, runs: int) -> ArrivalCosts:
    """Measure prompts of 300 tokens that arrive at once in as many slots, several times."""
    some = [_run(arrivals, KINDS[kind]) for _ in range(runs)]
    admission_ms = [(run.queue_s + run.schedule_s) * 1e3 for run in some]
    return ArrivalCosts(
        arrivals=arrivals,
        prompts=kind,
        runs=runs,
        steps=some[0].steps,
        receive_ms=_median_ms([run.receive_s for run in some]),
        queue_ms=_median_ms([run.queue_s for run in some]),
        schedule_ms=_median_ms([run.schedule_s for run in some]),
        first_step_ms=_median_ms([run.first_step_s for run in some]),
        admission_ms=round(median(admission_ms), 3),
        admission_best_ms=round(min(admission_ms), 3),
        all_ms=_median_ms([run.receive_s + run.queue_s + run.schedule_s for run in some]),
    )


def _median_ms(seconds: Sequence[float]) -> float:
    return round(median(seconds) * 1e3, 3)


def _run(arrivals: int, common: int) -> _Run:
    clock_s = min(timeit.repeat(thread_time, number=200, repeat=5)) / 200
    message = pickle.dumps(_sequences(arrivals, common), pickle.HIGHEST_PROTOCOL)
    scheduler = Scheduler(
        EngineOptions(
            Mode.PLAIN,
            max_sequences=arrivals,
            kv_tokens=arrivals * (_PROMPT_TOKENS + _MAX_TOKENS + _PAGE),
            page_tokens=_PAGE,
            prefill_rows=_PREFILL_ROWS,
        )
    )
    gc.collect()
    gc.disable()  # a worker's engine does not visit what lives long
    try:
        began = thread_time()
        sequences = pickle.loads(message)
        received = thread_time()
        for sequence in sequences:
            scheduler.add(sequence)
        queued = thread_time()
        steps_s: list[float] = []
        shares: list[float] = []
        while any(sequence.prefilling for sequence in sequences):
            steps_s.append(_step(scheduler, shares, arrivals) - clock_s)
        decoding_s = [_step(scheduler, [], arrivals) - clock_s for _ in steps_s]
    finally:
        gc.enable()
    alone_s = sum(share * seconds for share, seconds in zip(shares, decoding_s, strict=True))
    return _Run(
        len(steps_s), received - began - clock_s, queued - received - clock_s, sum(steps_s) - alone_s, steps_s[0]
    )


def _step(scheduler: Scheduler, shares: list[float], arrivals: int) -> float:
    """Return the seconds that scheduling a step takes; add the share of the arrivals that decode in it."""
    began = thread_time()
    batch = scheduler.next_batch()
    seconds = thread_time() - began
    shares.append(len(batch.decoding) / arrivals)
    _compute(batch)
    return seconds


def _compute(batch: Batch) -> None:
    """Do what the target does in a step: prefill the chunks, and draw a token for each emitting sequence."""
    for chunk in batch.chunks:
        if not chunk.completes:
            chunk.sequence.cached = chunk.end
    for sequence in batch.emitting:
        sequence.ids.append(_DRAWN)
        sequence.cached = len(sequence.ids) - 1
        sequence.steps += 1


def _sequences(count: int, common: int) -> list[EngineSequence]:
    """Return sequences whose prompts have their first `common` tokens in common."""
    ids = np.random.default_rng(0).integers(_DRAWN + 1, _VOCABULARY, (count, _PROMPT_TOKENS))
    ids[:, :common] = ids[0, :common]
    return [
        EngineSequence(
            ("job", index, 0),
            prompt,
            _PROMPT_TOKENS,
            _MAX_TOKENS,
            Sampling(key=noise_key(0, index)),
            frozenset([_EOS]),
            group="job",
        )
        for index, prompt in enumerate(ids.tolist())
    ]
