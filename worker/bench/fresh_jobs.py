"""Measure what a job loses or gains by drafts in a process of its own: no state but that of the database.

    python -m worker.bench.fresh_jobs --prompts prompts.jsonl --jobs 20 --database sqlite:///learned.db

Each job runs in a new process at one of the batch sizes, interleaved with two plain twins on the same prompts. All must
write the same texts. A process starts with what the ones before it have stored. How much one twin was faster than the
other is the error of a measurement with one twin.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from storage.schema import upgrade
from storage.session import Database
from worker.bench.interleaved import SlotRange, run_interleaved
from worker.benchmark import encode, new_sequences, parse_batches, read_prompts
from worker.engine.engine import Engine
from worker.engine.options import Mode
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.state import SpeculationState
from worker.engine.stats import StepBatch
from worker.loading.loader import LoadedModel, load_engine
from worker.serving.speculation_store import SpeculationStore
from worker.terminal import print_message, readable_errors, settings_of

_MODES = (Mode.OPT_TREE, Mode.PLAIN, Mode.PLAIN)  # of a job and its twins
_MIN_RATIO = 0.97  # of opt-tree over plain: what a job may lose


@dataclass(frozen=True, slots=True)
class TwinResult:
    """One job: its batch size, the rate of its plain twins, and opt-tree relative to them."""

    batch: int
    temperature: float
    plain_tokens_per_s: float
    ratio: float  # of opt-tree over the mean of the twins
    twins: float  # of the second twin over the first
    decisions: dict[str, int]  # steps of opt-tree by what they did


def run_job(loaded: LoadedModel, prompts: Sequence[list[int]], state: SpeculationState, job: TwinPlan) -> TwinResult:
    """Decode the prompts once with drafts and twice plainly, in turns; raises RuntimeError if the texts differ."""
    clock = process_time if job.cpu_time else perf_counter
    sequences = [new_sequences(loaded, list(prompts), job.max_tokens, job.temperature) for _ in _MODES]
    engines = [
        _engine(loaded, mode, index, job.batch, state, sequences[index], clock) for index, mode in enumerate(_MODES)
    ]
    decisions: Counter[str] = Counter()

    def count(index: int, results: StepBatch) -> None:
        if not index:
            decisions[results.decision.value] += 1

    seconds, *twins_seconds = run_interleaved(engines, clock, on_step=count)
    texts, plain_texts, others = ([s.output_ids for s in some] for some in sequences)
    if texts != plain_texts or others != plain_texts:
        raise RuntimeError("the texts depend on drafts; report this as a bug")
    tokens, plain_seconds = sum(map(len, plain_texts)), fmean(twins_seconds)
    return TwinResult(
        job.batch,
        job.temperature,
        tokens / plain_seconds,
        plain_seconds / seconds,
        twins_seconds[0] / twins_seconds[1],
        dict(decisions),
    )


@dataclass(frozen=True, slots=True)
class TwinPlan:
    """Batch size, temperature and answer length of a job, and by which clock it is measured and decides."""

    batch: int
    temperature: float
    max_tokens: int
    cpu_time: bool = False


def _engine(
    loaded: LoadedModel,
    mode: Mode,
    index: int,
    batch: int,
    state: SpeculationState,
    sequences: list[EngineSequence],
    clock: Callable[[], float],
) -> Engine:
    options = replace(loaded.options, mode=mode, max_sequences=batch)
    engine = loaded.engine(options, None, state, SlotRange(loaded.target, index * batch, batch), clock)
    for sequence in sequences:
        engine.add(sequence)
    return engine


def _in_new_process(arguments: Sequence[str], number: int, batch: int) -> TwinResult:
    this_job = ("--only", str(number), "--batches", str(batch))
    command = [sys.executable, "-m", "worker.bench.fresh_jobs", *arguments, *this_job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"job {number} failed:\n{done.stderr[-2000:]}")
    return TwinResult(**json.loads(done.stdout.splitlines()[-1]))


def _report(results: Sequence[TwinResult]) -> Table:
    table = Table("job", "batch", "T", "plain tokens/s", "opt-tree / plain", "plain / plain", "steps")
    for number, one in enumerate(results):
        table.add_row(
            str(number),
            str(one.batch),
            f"{one.temperature:g}",
            f"{one.plain_tokens_per_s:.1f}",
            f"{one.ratio:.3f}",
            f"{one.twins:.3f}",
            ", ".join(f"{name} {steps}" for name, steps in one.decisions.items()),
        )
    good = sum(one.ratio >= _MIN_RATIO for one in results)
    table.caption = (
        f"{good} of {len(results)} jobs at {_MIN_RATIO} or above; worst {min(one.ratio for one in results):.3f}"
    )
    return table


def main(
    target: Annotated[str | None, typer.Option(help="Model; default: BASIC_TARGET.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one JSON object a line.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of jobs.")] = 20,
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated; jobs take turns.")] = "64,16,8,1",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature.")] = 0.0,
    database: Annotated[
        str | None, typer.Option(help="URL of the database that keeps what is learned; default: one for this run.")
    ] = None,
    cpu_time: Annotated[
        bool, typer.Option(help="Measure CPU time, on a machine that does other work; with BASIC_THREADS=1.")
    ] = False,
    only: Annotated[int | None, typer.Option(help="Run this job alone, in this process.", hidden=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Compare jobs in new processes with plain twins.

    Example: python -m worker.bench.fresh_jobs --jobs 20 --database sqlite:///learned.db
    """
    sizes = parse_batches(batches)
    with readable_errors(), TemporaryDirectory() as folder:
        kept = database or f"sqlite:///{folder}/learned.db"
        if only is not None:
            job = TwinPlan(sizes[0], temperature, max_tokens, cpu_time)
            print(json.dumps(asdict(_run_here(target, prompts, kept, only, job))))
            return
        upgrade(kept)
        passed = [
            *(("--target", target) if target else ()),
            *(("--prompts", str(prompts)) if prompts else ()),
            *(("--cpu-time",) if cpu_time else ()),
            *("--max-tokens", str(max_tokens), "--temperature", str(temperature), "--database", kept),
        ]
        results = []
        for number in range(jobs):
            results.append(_in_new_process(passed, number, sizes[number % len(sizes)]))
            last = results[-1]
            print_message(
                f"Job {number}: batch {last.batch}, {last.ratio:.3f}; one twin over the other {last.twins:.3f}"
            )
    if as_json:
        for result in results:
            print(json.dumps(asdict(result)))
        return
    Console().print(_report(results))


def _run_here(target: str | None, prompts: Path | None, database: str, number: int, job: TwinPlan) -> TwinResult:
    """Run one job in this process: with what earlier ones have stored, which it continues."""
    loaded = load_engine(
        settings_of(target=target, mode=Mode.OPT_TREE.value, max_sequences=len(_MODES) * job.batch), print_message
    )
    known = encode(loaded, read_prompts(prompts, 10_000), job.max_tokens)
    wanted = max(job.batch, 4)
    texts = [known[(number * wanted + index) % len(known)] for index in range(wanted)]
    store = SpeculationStore(Database.open(database), loaded.draft_identity)
    state = store.read(loaded.speculation_state)
    result = run_job(loaded, texts, state, job)
    store.snapshot(state, now=True)
    store.write()
    return result


if __name__ == "__main__":
    typer.run(main)
