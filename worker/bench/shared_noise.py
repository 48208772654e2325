"""Measure what sharing the sampling noise between draft and target gains: tokens per step at temperature 1.

    python -m worker.bench.shared_noise --prompts examples/prompts.jsonl

One drafter ranks its candidates in three ways: with the target's Gumbel noise (as bASIC does), with independent noise
(as a draft that samples for itself), and by probability alone. Trees have a fixed size, as in the paper; the text is
the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from worker.benchmark import TimedRun, decode, encode, read_prompts
from worker.engine.options import Mode
from worker.engine.sampling.parameters import ParameterArray, noise_key
from worker.engine.sampling.sampling import gumbel_scores
from worker.engine.segments import IntArray
from worker.loading.loader import load_engine
from worker.settings import WorkerSettings
from worker.terminal import print_message

Noise = Callable[[Tensor, ParameterArray, IntArray, Tensor], Tensor]
_DRAFT_CHOICE = 1  # choice index whose noise the draft gets: the benchmark decodes choice 0 only


def independent_noise(scores: Tensor, parameters: ParameterArray, positions: IntArray, tokens: Tensor) -> Tensor:
    """Return the scores with noise that is independent of the target's."""
    others = parameters.copy()
    others["key"] = [noise_key(int(key), _DRAFT_CHOICE) for key in parameters["key"]]
    return gumbel_scores(scores, others, positions, tokens)


def no_noise(scores: Tensor, parameters: ParameterArray, positions: IntArray, tokens: Tensor) -> Tensor:
    """Return the scores without noise."""
    return scores


NOISES: dict[str, Noise] = {
    "the target's noise": gumbel_scores,
    "independent noise": independent_noise,
    "no noise": no_noise,
}


def main(
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL file of objects with `prompt`; default: the examples.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Max number of prompts.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Max tokens of each answer.")] = 128,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes per tree.")] = 16,
    temperature: Annotated[float, typer.Option(min=0.01, help="Sampling temperature of target and draft.")] = 1.0,
) -> None:
    """Print tokens per step for each kind of noise."""
    loaded = load_engine(WorkerSettings(nodes=nodes), print_message)
    texts = encode(loaded, read_prompts(prompts, limit), max_tokens)
    table = Table("candidates ranked with", "tokens/step", "same text")
    table.title = f"{loaded.draft or 'suffix'}, {nodes} nodes, temperature {temperature:g}, {limit} prompts"
    first: TimedRun | None = None
    for name, noise in NOISES.items():
        print_message(f"Decoding with {name}")
        with patch("worker.drafters.candidates.gumbel_scores", noise):
            timed = decode(loaded, texts, max_tokens, Mode.PAPER, temperature)(len(texts))
        first = first or timed
        assert timed.steps
        same = "yes" if timed.token_ids == first.token_ids else "NO"
        table.add_row(name, f"{(timed.tokens - len(texts)) / timed.steps:.3f}", same)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
