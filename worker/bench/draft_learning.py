"""Measure what a draft gains that learns from the texts of its job, against the same draft frozen.

    python -m worker.bench.draft_learning --prompts prompts.jsonl --batch 16

The job is decoded twice in paper mode, so that the tokens of a step depend on the draft alone and not on the load of
the machine: first with the frozen draft, then with one that learns. Both must write the same texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import sleep, thread_time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from worker.benchmark import encode, new_sequences, read_prompts
from worker.engine.options import Mode
from worker.engine.sequence import Sequence as EngineSequence
from worker.loading.drafts import learner_of
from worker.loading.loader import load_engine
from worker.settings import WorkerSettings
from worker.terminal import print_message, readable_errors, settings_of

PARTS = 5  # of the job, in the order of its prompts
_MAX_BACKLOG = 8  # texts that the learning process may lag behind, if the job waits for it


@dataclass(frozen=True, slots=True)
class LearningPlan:
    """How to decode the job."""

    batch: int
    nodes: int
    max_tokens: int
    temperature: float
    waits: bool  # for the learning process, as if it had a core of its own


@dataclass(frozen=True, slots=True)
class LearningRun:
    """One pass over the job."""

    tokens_per_step: tuple[float, ...]  # by part of the job
    swaps: int  # how often the head got other weights
    learning_share: float  # of the CPU time of the engine's thread


def decode_job(
    settings: WorkerSettings, prompts: Sequence[str], plan: LearningPlan
) -> tuple[LearningRun, list[list[int]]]:
    """Decode the prompts in order with the draft of the settings; return the measurement and the texts."""
    loaded = load_engine(settings, print_message)
    drafter = loaded.make_drafter()
    learner = learner_of(drafter)
    options = replace(loaded.options, mode=Mode.PAPER, nodes=plan.nodes, threshold=0.0, max_sequences=plan.batch)
    running = loaded.engine(options, lambda: drafter, loaded.speculation_state)
    sequences = new_sequences(loaded, encode(loaded, prompts, plan.max_tokens), plan.max_tokens, plan.temperature)
    for sequence in sequences:
        running.add(sequence)
    began_at = thread_time()
    while running.busy:
        running.step()
        while plan.waits and learner is not None and learner.backlog > _MAX_BACKLOG:
            sleep(0.1)
    cpu_s = thread_time() - began_at
    if learner is not None:
        learner.close()
    run = LearningRun(
        tokens_per_step=tuple(_tokens_per_step(sequences[part[0] : part[-1] + 1]) for part in _parts(len(sequences))),
        swaps=learner.swaps if learner else 0,
        learning_share=learner.thread_s / cpu_s if learner else 0.0,
    )
    return run, [sequence.output_ids for sequence in sequences]


def _parts(count: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.arange(count), PARTS)]


def _tokens_per_step(sequences: Sequence[EngineSequence]) -> float:
    """Return the tokens per step and sequence, without those that prefill emits."""
    tokens = sum(len(sequence.output_ids) - 1 for sequence in sequences)
    return tokens / max(sum(sequence.steps - 1 for sequence in sequences), 1)


def table(frozen: LearningRun, learning: LearningRun) -> Table:
    """Return tokens per step of both by part of the job."""
    shown = Table("part of the job", "frozen", "learning", "learning / frozen")
    for number, (a, b) in enumerate(zip(frozen.tokens_per_step, learning.tokens_per_step, strict=True), start=1):
        shown.add_row(f"{number} of {PARTS}", f"{a:.3f}", f"{b:.3f}", f"{b / a:.3f}")
    shown.caption = (
        f"{growth(frozen, learning):+.1%} from the first to the last part against the frozen draft; {learning.swaps} "
        f"swaps; learning took {learning.learning_share:.2%} of the engine thread's CPU time"
    )
    return shown


def growth(frozen: LearningRun, learning: LearningRun) -> float:
    """Return how much more the tokens per step grow from the first to the last part than with the frozen draft."""
    ratios = [b / a for a, b in zip(frozen.tokens_per_step, learning.tokens_per_step, strict=True)]
    return ratios[-1] / ratios[0] - 1.0


def main(
    prompts: Annotated[Path, typer.Option(exists=True, help="Prompts, one JSON object a line.")],
    target: Annotated[str | None, typer.Option(help="Model; default: BASIC_TARGET.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft; default: BASIC_DRAFT.")] = None,
    count: Annotated[int, typer.Option(min=PARTS, help="Number of prompts.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 16,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a draft tree.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 224,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature.")] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the learning process.")] = 1,
    waits: Annotated[
        bool, typer.Option("--wait", help="Wait for the learning process, as if it had a core of its own.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode a job with a frozen draft, then with one that learns from it.

    Example: python -m worker.bench.draft_learning --prompts examples/prompts.jsonl --count 10
    """
    plan = LearningPlan(batch, nodes, max_tokens, temperature, waits)
    with readable_errors():
        settings = settings_of(target=target, draft=draft, mode="paper", max_sequences=batch)
        texts = read_prompts(prompts, limit=count)
        frozen, plain = decode_job(settings.model_copy(update={"draft_learning_threads": 0}), texts, plan)
        learning, learned = decode_job(settings.model_copy(update={"draft_learning_threads": threads}), texts, plan)
    if plain != learned:
        raise RuntimeError("the texts depend on the draft; report this as a bug")
    if as_json:
        print(json.dumps({"frozen": asdict(frozen), "learning": asdict(learning), "growth": growth(frozen, learning)}))
    else:
        Console().print(table(frozen, learning))


if __name__ == "__main__":
    typer.run(main)
