"""Measure draws: the time to choose one token from each row of logits, by vocabulary, rows and sampling parameters.

    python -m worker.bench.draws --vocabulary 49152,151665 --rows 1,8,64

Logits are language-like: Zipf's law, normal spread and a few likely tokens. On a CPU, times are CPU time of one thread;
on a GPU, wall time of a call, whose tokens come back to the host. Each is the median of several calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import median
from time import perf_counter, thread_time
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jobs.errors import InvalidValue
from worker.benchmark import parse_batches
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sampling.penalties import adjustments_of
from worker.engine.sampling.sampling import draw, parameters_of

SAMPLINGS = {
    "greedy": Sampling(),
    "temperature 1": Sampling(1.0),
    "temperature 0.6, top_p 0.95": Sampling(0.6, top_p=0.95),
    "temperature 1, top_k 50": Sampling(1.0, top_k=50),
    "temperature 0.6, top_p 0.95, penalties": Sampling(0.6, top_p=0.95, presence_penalty=0.5, frequency_penalty=0.5),
}
_SEEN_TOKENS = 500  # distinct tokens of a sequence that penalties apply to
_LIKELY_TOKENS = 20


@dataclass(frozen=True, slots=True)
class DrawTime:
    """The time of one call that draws all rows."""

    sampling: str
    vocabulary: int
    rows: int
    dtype: str
    ms: float
    us_per_row: float


def language_like(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Return float32 logits [rows, vocabulary] with few likely tokens, in random places."""
    generator = torch.Generator().manual_seed(seed)
    zipf = -1.1 * torch.arange(1, vocabulary + 1).float().log()
    logits = torch.randn(rows, vocabulary, generator=generator) * 1.5
    for row in logits:
        row += zipf[torch.randperm(vocabulary, generator=generator)]
        likely = torch.randint(0, vocabulary, (_LIKELY_TOKENS,), generator=generator)
        row[likely] += torch.rand(_LIKELY_TOKENS, generator=generator) * (2 + 8 * torch.rand(1, generator=generator))
    return logits


def measure(logits: Tensor, name: str, repeats: int) -> DrawTime:
    """Return the time of drawing all rows of `logits` [rows, vocabulary] with SAMPLINGS[name]."""
    rows, vocabulary = logits.shape
    samplings = [replace(SAMPLINGS[name], key=noise_key(0, row)) for row in range(rows)]
    parameters, positions = parameters_of(samplings), np.arange(rows)
    adjustments = None
    if SAMPLINGS[name].adjusted:
        seen = np.random.default_rng(0).choice(vocabulary, min(_SEEN_TOKENS, vocabulary), replace=False)
        adjustments = adjustments_of([s.bias for s in samplings], [(seen, seen % 3)] * rows)
    clock = thread_time if logits.device.type == "cpu" else perf_counter

    def call() -> float:
        started = clock()
        draw(logits, parameters, positions, adjustments=adjustments)
        return clock() - started

    call()
    seconds = median(call() for _ in range(repeats))
    dtype = str(logits.dtype).removeprefix("torch.")
    return DrawTime(name, vocabulary, rows, dtype, round(seconds * 1e3, 4), round(seconds / rows * 1e6, 1))


def _all(
    vocabularies: tuple[int, ...], counts: tuple[int, ...], repeats: int, place: Callable[[Tensor], Tensor]
) -> Iterator[DrawTime]:
    for vocabulary in vocabularies:
        logits = place(language_like(max(counts), vocabulary))
        for name, rows in product(SAMPLINGS, counts):
            yield measure(logits[:rows], name, repeats)


def main(
    vocabulary: Annotated[str, typer.Option(help="Ids of the vocabulary, comma-separated.")] = "49152,151665",
    rows: Annotated[str, typer.Option(help="Rows drawn in one call, comma-separated.")] = "1,8,64",
    repeats: Annotated[int, typer.Option(min=1, help="Calls per line.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: of the logits.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure draws of one token from each row of logits.

    Example: python -m worker.bench.draws --vocabulary 152064 --rows 64,256 --device cuda --dtype bfloat16
    """
    try:
        vocabularies, counts = parse_batches(vocabulary), parse_batches(rows)
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    except InvalidValue as error:
        raise typer.BadParameter(error.message) from None
    except KeyError:
        raise typer.BadParameter(f"--dtype: {dtype}: must be float32 or bfloat16") from None
    torch.set_num_threads(1)
    table = Table("sampling", "vocabulary", "rows", "ms", "us a row", title=f"Draws on {device}, {dtype}")
    for one in _all(vocabularies, counts, repeats, lambda logits: logits.to(device, kind)):
        if as_json:
            print(json.dumps(asdict(one)))
        table.add_row(one.sampling, str(one.vocabulary), str(one.rows), f"{one.ms:.3f}", f"{one.us_per_row:.0f}")
    if not as_json:
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
