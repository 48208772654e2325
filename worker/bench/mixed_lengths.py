"""Measure a job of answers of mixed lengths at full batch: KV pages on demand, against memory reserved in full.

    python -m worker.bench.mixed_lengths --requests 64 --kv-tokens 8400

The requests name no max_tokens, so a full reservation is the whole context, and their answers end after 30 to 300
tokens, as a stop string would end them. Both engines run in turns and must write the same texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from worker.benchmark import encode, read_prompts
from worker.engine.admission import MAX_PREEMPTIONS
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sequence import Sequence as EngineSequence
from worker.loading.loader import LoadedModel, load_engine
from worker.terminal import print_message, readable_errors, settings_of

_SHORTEST, _LONGEST = 30, 300  # tokens of an answer
_TEMPERATURE, _TOP_P = 0.8, 0.95


@dataclass(frozen=True, slots=True)
class JobRun:
    """One run of the job."""

    memory: str  # how it is taken: on demand, or reserved
    tokens: int
    mean_batch: float  # sequences decoded together, while others waited
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    preemptions: int
    recomputed_share: float  # of the tokens of prompts and answers


def measure(loaded: LoadedModel, prompts: Sequence[list[int]], requests: int) -> list[JobRun]:
    """Run the job with memory on demand and with memory reserved in full; raises RuntimeError if texts differ."""
    lengths = np.random.default_rng(0).integers(_SHORTEST, _LONGEST + 1, requests).tolist()
    jobs, texts = [], []
    for memory in ("reserved", "on demand"):
        some = _sequences(loaded, prompts, requests)
        for sequence in some:
            sequence.preemptions = MAX_PREEMPTIONS if memory == "reserved" else 0
        jobs.append(_run(loaded, memory, some, lengths))
        texts.append([s.output_ids[:length] for s, length in zip(some, lengths, strict=True)])
    if texts[0] != texts[1]:
        raise RuntimeError("the texts depend on how memory is taken; report this as a bug")
    return jobs


def _sequences(loaded: LoadedModel, prompts: Sequence[list[int]], requests: int) -> list[EngineSequence]:
    context = loaded.options.max_context
    some = [prompts[index % len(prompts)] for index in range(requests)]
    return [
        EngineSequence(i, list(ids), len(ids), context - len(ids), _sampling(i), group=0) for i, ids in enumerate(some)
    ]


def _sampling(index: int) -> Sampling:
    return Sampling(temperature=_TEMPERATURE, top_p=_TOP_P, key=noise_key(1, index))


def _run(loaded: LoadedModel, memory: str, some: list[EngineSequence], lengths: list[int]) -> JobRun:
    engine = loaded.engine()
    for sequence in some:
        engine.add(sequence)
    full_steps = decoded = 0
    wall_s, cpu_s = perf_counter(), process_time()
    while engine.busy:
        results = engine.step()
        if any(sequence.slot < 0 and not sequence.finished for sequence in some):
            full_steps, decoded = full_steps + 1, decoded + len(results)
        pairs = zip(some, lengths, strict=True)
        engine.cancel({s.key for s, length in pairs if not s.finished and len(s.ids) - s.num_prompt >= length})
    wall_s, cpu_s = perf_counter() - wall_s, process_time() - cpu_s
    tokens = sum(min(len(s.output_ids), length) for s, length in zip(some, lengths, strict=True))
    return JobRun(
        memory=memory,
        tokens=tokens,
        mean_batch=decoded / max(1, full_steps),
        wall_s=wall_s,
        cpu_s=cpu_s,
        tokens_per_s=tokens / wall_s,
        preemptions=engine.preemptions,
        recomputed_share=engine.recomputed_tokens / (tokens + sum(s.num_prompt for s in some)),
    )


def main(
    target: Annotated[str | None, typer.Option(help="Model; default: BASIC_TARGET.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one JSON object a line.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the job.")] = 64,
    kv_tokens: Annotated[int, typer.Option(min=1, help="KV memory in tokens.")] = 8400,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a context.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Run a job of answers of mixed lengths, plain, with KV memory reserved in full and on demand.

    Example: python -m worker.bench.mixed_lengths --requests 200 --kv-tokens 8400
    """
    with readable_errors():
        limits = {"kv_tokens": kv_tokens, "max_context": context, "max_sequences": 64}
        settings = settings_of(target=target, mode=Mode.PLAIN.value, **limits)
        loaded = load_engine(settings, print_message)
        jobs = measure(loaded, encode(loaded, read_prompts(prompts, requests), _LONGEST), requests)
    if as_json:
        for job in jobs:
            print(json.dumps(asdict(job)))
        return
    table = Table("KV memory", "tokens", "mean batch", "tokens/s", "CPU s", "preemptions", "computed twice")
    table.title = f"{loaded.name} on {loaded.device}, {kv_tokens:,} KV tokens, {requests} requests"
    for job in jobs:
        rates = (f"{job.mean_batch:.1f}", f"{job.tokens_per_s:.1f}", f"{job.cpu_s:.1f}")
        table.add_row(job.memory, f"{job.tokens:,}", *rates, str(job.preemptions), f"{job.recomputed_share:.1%}")
    table.caption = f"Speed-up {jobs[1].tokens_per_s / jobs[0].tokens_per_s:.2f}; the texts are the same"
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
