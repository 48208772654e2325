"""Measure the host's work in one engine step: CPU time of the engine's thread, with a target that computes nothing.

Scheduler, planner, packing, paged rows and results are those of a worker. What the target itself would compute is not
counted, and the engine's clock is that of a device whose steps take 25 to 44 ms, so decisions do not depend on this
machine. Hand-over is the serialisation of the step's results for another process.
"""

from __future__ import annotations

import pickle
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from time import thread_time
from typing import Any
from unittest.mock import patch

import numpy as np

from worker.bench.host_costs.null_models import (
    BLOCK,
    STEP_MS,
    VOCABULARY,
    CompiledNullDrafter,
    NullDrafter,
    NullTarget,
)
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine import engine as engine_module
from worker.engine.batch import Batch
from worker.engine.engine import Engine
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.planner import Planner
from worker.serving.resilient_engine import ResilientEngine

MODES = ("plain", "trees", "layers", "opt-tree")
_PROMPT_TOKENS = 300
_MAX_TOKENS = 2000
_CONTEXT = 4096
_TREE_NODES = 8
_WARM_UP_STEPS = 10


@dataclass(frozen=True, slots=True)
class HostCosts:
    """CPU time of the engine's thread in one kind of step, in ms a step."""

    sequences: int
    mode: str
    temperature: float
    steps: int
    tokens_per_step: float
    nodes_per_step: float  # draft nodes that the target verified
    result_bytes: int  # of the serialised results of one step
    mean_ms: float
    median_ms: float
    low_ms: float  # of the fastest tenth of the steps: those that other processes of the machine disturbed least
    parts_ms: dict[str, float]  # medians of other steps than those above; `other` is the rest


class _PartTimes:
    """CPU time of steps and of their parts, in seconds.

    Reading the clock of a thread is a system call, 0.3 to 5 us: steps whose parts are timed take longer, so every
    second step is timed as a whole.
    """

    def __init__(self) -> None:
        self.parts_s: defaultdict[str, list[float]] = defaultdict(list)  # of each step whose parts were timed
        self._spent_s: defaultdict[str, float] | None = None  # of the step; None: its parts are not timed
        self._clock_s = min(timeit.repeat(thread_time, number=200, repeat=5)) / 200

    def run(self, engine: ResilientEngine, target: NullTarget, steps: int) -> tuple[list[float], int, int]:
        """Run twice as many steps; return the ms of each one that was timed as a whole.

        Then the draft nodes of all, and the bytes of the last one's results.
        """
        steps_ms, nodes, packed = [], 0, b""
        with self._measured(target):
            for step in range(2 * steps):
                self._spent_s = defaultdict(float) if step % 2 else None
                started, own_s = thread_time(), target.own_s
                results, _given_up = engine.step()
                stepped = thread_time() if step % 2 else 0.0
                packed = pickle.dumps(results, pickle.HIGHEST_PROTOCOL)
                ended = thread_time()
                nodes += int(results.tree_nodes.sum())
                if self._spent_s is None:
                    steps_ms.append((ended - started - self._clock_s - (target.own_s - own_s)) * 1e3)
                    continue
                self._spent_s["layout"] -= target.own_s - own_s
                self._spent_s["hand over"] = ended - stepped - self._clock_s
                for part, spent_s in self._spent_s.items():
                    self.parts_s[part].append(spent_s)
        return steps_ms, nodes, len(packed)

    @contextmanager
    def _measured(self, target: NullTarget) -> Iterator[None]:
        """Time the parts of a step; parts do not nest."""
        with ExitStack() as patches:
            for owner, name, part in _PARTS:
                timed = self._timed(getattr(owner, name), part)
                replacement = staticmethod(timed) if isinstance(owner.__dict__[name], staticmethod) else timed
                patches.enter_context(patch.object(owner, name, replacement))
            patches.enter_context(patch.object(target, "forward", self._timed(target.forward, "layout")))
            yield

    def _timed(self, work: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            if self._spent_s is None:
                return work(*given, **named)
            started = thread_time()
            try:
                return work(*given, **named)
            finally:
                self._spent_s[part] += thread_time() - started - self._clock_s

        return run


_PARTS: tuple[tuple[Any, str, str], ...] = (
    (Scheduler, "next_batch", "schedule"),
    (Planner, "plan", "plan"),
    (Batch, "pack", "pack"),
    (engine_module, "walk", "walk"),
    (engine_module, "_emit", "emit"),
    (Engine, "_commit", "commit"),
    (Engine, "_results", "results"),
    (Engine, "_drop_finished", "drop finished"),
)


def measure(sequences: int, mode: str, steps: int, temperature: float = 0.0) -> HostCosts:
    """Time `steps` steps of `sequences` sequences, all past their prompts, and the parts of as many; none ends."""
    options = _options(sequences, mode)
    target = NullTarget(sequences, options.slot_tokens, _kv_tokens(sequences))
    drafters: dict[str, Callable[[], Drafter | None]] = {
        "plain": lambda: None,
        "trees": CompiledNullDrafter,
        "layers": NullDrafter,
        "opt-tree": SuffixDrafter,
    }
    engine = ResilientEngine(lambda: Engine(target, drafters[mode](), options, CostModel(STEP_MS), clock=target.clock))
    texts = _sequences(sequences, temperature)
    for text in texts:
        engine.add(text)
    while any(text.prefilling for text in texts):
        engine.step()
    for _ in range(_WARM_UP_STEPS):
        engine.step()
    times = _PartTimes()
    before = sum(len(text.ids) for text in texts)
    steps_ms, nodes, result_bytes = times.run(engine, target, steps)
    parts = {part: round(median(spent_s) * 1e3, 4) for part, spent_s in times.parts_s.items()}
    parts["other"] = round(median(steps_ms) - sum(parts.values()), 4)
    return HostCosts(
        sequences=sequences,
        mode=mode,
        temperature=temperature,
        steps=steps,
        tokens_per_step=(sum(len(text.ids) for text in texts) - before) / (2 * steps),
        nodes_per_step=nodes / (2 * steps),
        result_bytes=result_bytes,
        mean_ms=round(fmean(steps_ms), 4),
        median_ms=round(median(steps_ms), 4),
        low_ms=round(float(np.quantile(steps_ms, 0.1)), 4),
        parts_ms=parts,
    )


def _options(sequences: int, mode: str) -> EngineOptions:
    given: dict[str, Any] = {"max_sequences": sequences, "max_context": _CONTEXT, "kv_tokens": _kv_tokens(sequences)}
    given["page_tokens"] = BLOCK
    given["prefill_rows"] = 8192
    if mode in ("trees", "layers"):
        # Every tree has as many nodes; in opt-tree mode the batch has a limit for all trees together.
        return EngineOptions(Mode.PAPER, **given, nodes=_TREE_NODES, calibrated=True)
    return EngineOptions(Mode(mode), **given)


def _kv_tokens(sequences: int) -> int:
    return sequences * (_PROMPT_TOKENS + _MAX_TOKENS + 200)


def _sequences(count: int, temperature: float) -> list[EngineSequence]:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (count, _PROMPT_TOKENS)).tolist()
    sampling = [Sampling(temperature=temperature, key=noise_key(0, index)) for index in range(count)]
    eos = frozenset([VOCABULARY])  # never drawn
    return [
        EngineSequence(("job", index, 0), ids[index], _PROMPT_TOKENS, _MAX_TOKENS, sampling[index], eos, group="job")
        for index in range(count)
    ]
