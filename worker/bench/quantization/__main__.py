"""Load the target in each form of weights and KV, and print steps and distances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.settings import read_settings
from worker.bench.quantization.measure import CONTEXT, FormDistance, FormTime, measure_distances, measure_steps
from worker.benchmark import parse_batches, read_prompts
from worker.engine.kv.fp8 import store_kv_in_fp8
from worker.engine.model.backend import fuse_layers, stored_bytes
from worker.engine.model.loading import load, native_dtype
from worker.engine.model.packed_model import PackedModel
from worker.engine.quantization.weights import QuantizationMethod
from worker.loading.model_store import resolve
from worker.settings import WorkerSettings
from worker.text.codec import load_tokenizer

_PLAIN, _FP8_KV = "none", "+kv"


def main(
    texts: Annotated[Path, typer.Option(help="JSON lines with a prompt each: the texts to compare on.")],
    forms: Annotated[
        str,
        typer.Option(
            help="Weights to compare, with FP8 KV if +kv is appended; the first is what others are compared with."
        ),
    ] = "none,none+kv,int8,fp8",
    rows: Annotated[str, typer.Option(help="Sequences of a timed step, comma-separated.")] = "1,8,64",
    count: Annotated[int, typer.Option(min=1, help="Texts that are read.")] = 60,
    tokens: Annotated[int, typer.Option(min=2, help="Max tokens of a text.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a step.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence before a timed step.")] = CONTEXT,
    rounds: Annotated[int, typer.Option(min=1, help="Steps per form and number of rows.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure steps and distances of the target with quantised weights and KV, on a CPU.

    Example: python -m worker.bench.quantization --texts prompts.jsonl --threads 2
    """
    settings, batches = read_settings(WorkerSettings), parse_batches(rows)
    torch.set_num_threads(threads)
    path, device = resolve(settings.target, settings.cache_dir), torch.device("cpu")
    models, mib = {}, {}
    for form in forms.split(","):
        weights = form.removesuffix(_FP8_KV)
        method = None if weights == _PLAIN else QuantizationMethod(weights)
        model = load(path, dtype=native_dtype(device), device=device, quantization=method)
        if form.endswith(_FP8_KV):
            store_kv_in_fp8(model)
        fuse_layers(model)
        mib[form] = round(sum(stored_bytes(model).values()) / 2**20, 1)
        models[form] = PackedModel(model, slots=max(batches), capacity=tokens + context)
    tokenizer = load_tokenizer(path)
    ids = [tokenizer(text)["input_ids"][:tokens] for text in read_prompts(texts, count)]
    distances = measure_distances(models, mib, ids)
    steps = [one for batch in batches for one in measure_steps(models, batch, rounds, context)]
    sections: dict[str, Sequence[FormDistance | FormTime]] = {"Distances": distances, "Steps": steps}
    if as_json:
        print("\n".join(json.dumps(asdict(one)) for found in sections.values() for one in found))
        return
    for title, found in sections.items():
        table = Table(*asdict(found[0]), title=f"{title} of {settings.target}")
        for one in found:
            table.add_row(*map(str, asdict(one).values()))
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
