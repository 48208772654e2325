"""Measure the host's work in one engine step: CPU time of the engine's thread, with a target that computes nothing.

    python -m worker.bench.host_costs --sequences 64,256 --mode plain,trees

Scheduler, planner, packing, paged rows and results are those of a worker. What the target itself would compute is not
counted, and the engine's clock is that of a device whose steps take 25 to 44 ms, so decisions do not depend on this
machine. Hand-over is the serialisation of the step's results for another process.
"""

from __future__ import annotations

import json
import pickle
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median
from time import thread_time
from typing import Annotated, Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jobs.errors import InvalidValue
from worker.benchmark import parse_batches
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine import engine as engine_module
from worker.engine.batch import Batch
from worker.engine.engine import Engine
from worker.engine.host.growth import bigram_source
from worker.engine.host.sources import CompiledSource
from worker.engine.options import EngineOptions, Mode
from worker.engine.paged.attention import PagedAttentionPlan, paged_plan
from worker.engine.paged.cuda_graphs import Captured
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import PagedRows
from worker.engine.paged.shape_buckets import BucketedForward, Outputs
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.scheduler import Scheduler
from worker.engine.segments import IntArray, KvMove, Segment
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.planner import Planner
from worker.serving.resilient_engine import ResilientEngine

VOCABULARY = 64  # few, because the argmax of logits is the device's work
_PROMPT_TOKENS = 300
_MAX_TOKENS = 2000
_CONTEXT = 4096
_BLOCK = 64  # KV entries of a block
_TREE_NODES = 8
_STEP_MS = {1: 24.7, 64: 27.5, 128: 31.7, 256: 44.0}  # of the device, by rows
_WARM_UP_STEPS = 10

# Drafts and draws, as distances to the token before: the target draws the first candidate 6 times of 10.
_CANDIDATES, _PROBABILITIES = np.array([1, 2]), np.array([0.6, 0.2])
_DISTANCES = np.random.default_rng(0).choice([1, 2, 3], 997, p=[0.6, 0.2, 0.2])

T = TypeVar("T")
MODES = ("plain", "trees", "layers", "opt-tree")


class NullTarget:
    """A paged language model whose forward computes nothing: it draws a known token at each row."""

    def __init__(self, slots: int, capacity: int) -> None:
        """Allocate slots of `capacity` KV entries of the smallest size."""
        tokens = slots * (_PROMPT_TOKENS + _MAX_TOKENS + 200)
        self._kv = PagedKv(
            1, slots, 1, capacity, 1, torch.float32, torch.device("cpu"), block_size=_BLOCK, tokens=tokens
        )
        self._rows: PagedRows | None = None  # of the last forward that was captured
        self._buckets = BucketedForward(self._run, self._kv, self._capture)
        self._costs = CostModel(_STEP_MS)
        self._distances = torch.from_numpy(_DISTANCES)
        self.now_s = 0.0  # of the device's clock
        self.own_s = 0.0  # CPU time of the forward itself, which a device would spend, and of measuring it
        self.clock_s = min(timeit.repeat(thread_time, number=200, repeat=5)) / 200

    def clock(self) -> float:
        """Return the seconds that the device has worked."""
        return self.now_s

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Lay out the rows as a GPU's forward does, and return their logits."""
        shape = self._buckets.shape_for(segments)
        if shape is not None:
            return self._buckets.forward(segments, shape)[0]
        plan = paged_plan(segments, self._kv)
        return self._run(plan.rows, plan)[0]

    def _capture(self, work: Callable[[], T]) -> Captured[T]:
        """Capture a forward: its replays, like those of a CUDA graph, build no views of the rows."""
        work()
        assert self._rows is not None
        return Captured(partial(self._drawn, self._rows))  # type: ignore[arg-type]  # outputs, as those of `work`

    def _run(self, rows: PagedRows, _: PagedAttentionPlan) -> Outputs:
        self._rows = rows
        return self._drawn(rows)

    def _drawn(self, rows: PagedRows) -> Outputs:
        started = thread_time()
        ids, positions = rows.ids[rows.kept], rows.positions[rows.kept]
        drawn = (ids + self._distances[positions % len(self._distances)]) % VOCABULARY
        logits = torch.zeros(len(drawn), VOCABULARY).scatter_(1, drawn.unsqueeze(1), 1.0)
        count = rows.shape.rows
        self.now_s += float(self._costs.step_ms(np.array([count]), np.array([0.0]))[0]) / 1e3
        self.own_s += thread_time() - started + self.clock_s
        return logits, None

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move the KV entries of accepted paths."""
        self._kv.compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Share a prefix."""
        self._kv.copy_prefix(source, target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Free the blocks of a slot beyond `length` entries."""
        self._kv.truncate(slot, length)

    def clear(self) -> None:
        """Free all blocks."""
        for slot in range(self._kv.slots):
            self._kv.truncate(slot, 0)


class NullDrafter:
    """A drafter that computes nothing: two candidates below each node."""

    name = "null"
    forward_free = None

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer the two tokens that the target draws most often."""
        tokens = (forest.token[frontier, None] + _CANDIDATES) % VOCABULARY
        return Candidates(tokens, np.broadcast_to(_PROBABILITIES, tokens.shape))

    def num_uncached_tokens(self, sequence: EngineSequence) -> int:
        """Return 0: it reads nothing."""
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Learn nothing."""

    def drop(self, sequence: EngineSequence) -> None:
        """Forget nothing."""


class CompiledNullDrafter(NullDrafter):
    """The same, whose candidates compiled code finds: the trees of a step grow in one call."""

    def __init__(self) -> None:
        tokens = (np.arange(VOCABULARY)[:, None] + _CANDIDATES) % VOCABULARY
        self._source = bigram_source(tokens, np.broadcast_to(_PROBABILITIES, tokens.shape))

    def source(self, forest: Forest, roots: IntArray) -> CompiledSource:
        """Return the table of candidates."""
        assert self._source is not None, "there is no C compiler"
        return self._source


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
    target = NullTarget(sequences, options.slot_tokens)
    drafters: dict[str, Callable[[], Drafter | None]] = {
        "plain": lambda: None,
        "trees": CompiledNullDrafter,
        "layers": NullDrafter,
        "opt-tree": SuffixDrafter,
    }
    engine = ResilientEngine(lambda: Engine(target, drafters[mode](), options, CostModel(_STEP_MS), clock=target.clock))
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
    kv_tokens = sequences * (_PROMPT_TOKENS + _MAX_TOKENS + 200)
    given: dict[str, Any] = {"max_sequences": sequences, "max_context": _CONTEXT, "kv_tokens": kv_tokens}
    given["page_tokens"] = _BLOCK
    given["prefill_rows"] = 8192
    if mode in ("trees", "layers"):
        # Every tree has as many nodes; in opt-tree mode the batch has a limit for all trees together.
        return EngineOptions(Mode.PAPER, **given, nodes=_TREE_NODES, calibrated=True)
    return EngineOptions(Mode(mode), **given)


def _sequences(count: int, temperature: float) -> list[EngineSequence]:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (count, _PROMPT_TOKENS)).tolist()
    sampling = [Sampling(temperature=temperature, key=noise_key(0, index)) for index in range(count)]
    eos = frozenset([VOCABULARY])  # never drawn
    return [
        EngineSequence(("job", index, 0), ids[index], _PROMPT_TOKENS, _MAX_TOKENS, sampling[index], eos, group="job")
        for index in range(count)
    ]


def main(
    sequences: Annotated[str, typer.Option(help="Sequences decoded together, comma-separated.")] = "64,256",
    mode: Annotated[
        str,
        typer.Option(
            help="plain; trees: 8 nodes for each sequence; layers: the same, from a drafter in Python; "
            "opt-tree: suffix drafts. Comma-separated."
        ),
    ] = "plain,trees,opt-tree",
    steps: Annotated[
        int, typer.Option(min=1, help="Steps that are timed per line, and as many whose parts are.")
    ] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of every sequence.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure the CPU time of the engine's thread per step, without the target's own work.

    Example: python -m worker.bench.host_costs --sequences 64,256 --mode plain --json
    """
    try:
        counts = parse_batches(sequences)
    except InvalidValue as error:
        raise typer.BadParameter(error.message) from None
    modes = mode.split(",")
    if unknown := set(modes) - set(MODES):
        raise typer.BadParameter(f"--mode: {', '.join(sorted(unknown))}: must be of {', '.join(MODES)}")
    torch.set_num_threads(1)
    costs = [measure(count, name, steps, temperature) for name in modes for count in counts]
    if as_json:
        for one in costs:
            print(json.dumps(asdict(one)))
        return
    table = Table("CPU ms per step", *(f"{one.mode} {one.sequences}" for one in costs))
    for part in costs[0].parts_ms:
        table.add_row(part, *(f"{one.parts_ms.get(part, 0.0):.3f}" for one in costs))
    table.add_row("all", *(f"{one.mean_ms:.3f}" for one in costs), end_section=True)
    table.add_row("median", *(f"{one.median_ms:.3f}" for one in costs))
    table.add_row("fastest tenth", *(f"{one.low_ms:.3f}" for one in costs))
    for name in ("tokens_per_step", "nodes_per_step", "result_bytes"):
        table.add_row(name.replace("_", " "), *(f"{getattr(one, name):.0f}" for one in costs))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
