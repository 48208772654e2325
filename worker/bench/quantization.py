"""Quantised weights beside those of the checkpoint: time of a step, and distance of the next token's distribution.

All forms are in one process and take turns, so that a busy machine slows all of them. The distance is that of the
logits at each token of the texts: the divergence of Kullback and Leibler in nats, and how often the most likely token
is the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jobs.settings import read_settings
from worker.benchmark import parse_batches, read_prompts
from worker.engine.model.backend import fuse_layers, stored_bytes
from worker.engine.model.loading import load, native_dtype
from worker.engine.model.packed_model import PackedModel
from worker.engine.quantization.weights import QuantizationMethod
from worker.engine.segments import chain
from worker.loading.model_store import resolve
from worker.settings import WorkerSettings
from worker.text.codec import load_tokenizer

_PLAIN = "none"
_CONTEXT = 32  # tokens before the rows of a timed step
_TEXT_TOKENS = 200  # of a text, at most


@dataclass(frozen=True, slots=True)
class FormTime:
    """The fastest step of a form with a number of rows, one of each sequence."""

    form: str
    rows: int
    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class FormDistance:
    """How far the next tokens of a form are from those of the checkpoint's weights, over all tokens of the texts."""

    form: str
    mib: float  # of weights in memory
    tokens: int
    loss: float  # negative log probability of the texts' own tokens, in nats a token
    divergence: float  # mean, in nats
    divergence_p99: float
    same_top: float  # share of tokens after which the most likely one is the same


def measure_steps(models: dict[str, PackedModel], rows: int, rounds: int) -> list[FormTime]:
    """Return the fastest of a few steps of each form."""
    step = [chain(slot, _CONTEXT, [7], keep_last=True) for slot in range(rows)]
    best = {form: (float("inf"), float("inf")) for form in models}
    for model in models.values():
        model.forward([chain(slot, 0, [1] * _CONTEXT, keep_last=True) for slot in range(rows)])
    for _ in range(rounds):
        for form, model in models.items():
            wall, cpu = perf_counter(), process_time()
            model.forward(step)
            best[form] = min(best[form][0], perf_counter() - wall), min(best[form][1], process_time() - cpu)
    return [FormTime(form, rows, round(wall * 1e3, 2), round(cpu * 1e3, 2)) for form, (wall, cpu) in best.items()]


def measure_distances(
    models: dict[str, PackedModel], mib: dict[str, float], texts: Sequence[list[int]]
) -> list[FormDistance]:
    """Return the distance of each form from the first one."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {form: [] for form in models}
    for ids in texts:
        exact: Tensor | None = None
        for form, model in models.items():
            rows = replace(chain(0, 0, ids, keep_last=True), keep=np.arange(len(ids)))
            logs = model.forward([rows]).float().log_softmax(-1)
            exact = logs if exact is None else exact
            losses = -logs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            divergences = (exact.exp() * (exact - logs)).sum(1)
            found[form].append((losses, divergences, exact.argmax(1) == logs.argmax(1)))
    return [_distance(form, mib[form], parts) for form, parts in found.items()]


def _distance(form: str, mib: float, parts: list[tuple[Tensor, Tensor, Tensor]]) -> FormDistance:
    losses, divergences, same = (torch.cat(column) for column in zip(*parts, strict=True))
    figures = (losses.mean(), divergences.mean(), divergences.quantile(0.99), same.float().mean())
    return FormDistance(form, mib, len(same), *(round(float(figure), 5) for figure in figures))


def main(
    texts: Annotated[Path, typer.Option(help="JSON lines with a prompt each: the texts to compare on.")],
    forms: Annotated[str, typer.Option(help="Weights to compare; the first is what others are compared with.")] = (
        "none,int8,fp8"
    ),
    rows: Annotated[str, typer.Option(help="Sequences of a timed step, comma-separated.")] = "1,8,64",
    count: Annotated[int, typer.Option(min=1, help="Texts that are read.")] = 60,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a step.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Steps per form and number of rows.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure steps and distances of the target with quantised weights, on a CPU.

    Example: python -m worker.bench.quantization --texts prompts.jsonl --threads 2
    """
    settings, batches = read_settings(WorkerSettings), parse_batches(rows)
    torch.set_num_threads(threads)
    path, device = resolve(settings.target, settings.cache_dir), torch.device("cpu")
    models, mib = {}, {}
    for form in forms.split(","):
        method = None if form == _PLAIN else QuantizationMethod(form)
        model = load(path, dtype=native_dtype(device), device=device, quantization=method)
        fuse_layers(model)
        mib[form] = round(sum(stored_bytes(model).values()) / 2**20, 1)
        models[form] = PackedModel(model, slots=max(batches), capacity=_TEXT_TOKENS + _CONTEXT)
    tokenizer = load_tokenizer(path)
    ids = [tokenizer(text)["input_ids"][:_TEXT_TOKENS] for text in read_prompts(texts, count)]
    distances = measure_distances(models, mib, ids)
    steps = [one for batch in batches for one in measure_steps(models, batch, rounds)]
    if as_json:
        print("\n".join(json.dumps(asdict(one)) for one in (*distances, *steps)))
        return
    for title, found in (("Distances", distances), ("Steps", steps)):
        table = Table(*asdict(found[0]), title=f"{title} of {settings.target}")
        for one in found:
            table.add_row(*map(str, asdict(one).values()))
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
