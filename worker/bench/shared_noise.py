"""What the noise is worth that drafts share with the target: tokens a step at temperature 1, with it and without.

    python -m worker.bench.shared_noise --prompts examples/prompts.jsonl

One drafter ranks its candidates with the target's own noise (what bASIC does), with noise of its own (as a draft that
draws for itself), and by probability alone. The trees are the paper's, of a fixed size; the text is the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from worker.benchmark import TimedRun, decode, encode, read_prompts
from worker.engine.options import Mode
from worker.engine.sampling.sampling import Sampling, gumbel_scores, noise_key
from worker.loading.loader import load_engine
from worker.settings import WorkerSettings
from worker.terminal import say

Noise = Callable[[Tensor, Sequence[Sampling], Sequence[int], Tensor], Tensor]
_OTHER = 1  # of the choice that a draft's own noise stands for: nobody asks for two


def own(scores: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], tokens: Tensor) -> Tensor:
    """Return the scores under noise that the target knows nothing of."""
    return gumbel_scores(scores, [replace(s, key=noise_key(s.key, _OTHER)) for s in samplings], positions, tokens)


def none(scores: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], tokens: Tensor) -> Tensor:
    """Return the scores as they are."""
    return scores


WAYS: dict[str, Noise] = {"the target's noise": gumbel_scores, "noise of its own": own, "no noise": none}


def main(
    prompts: Annotated[Path | None, typer.Option(help="JSONL of objects with prompt; left out: the examples.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to read.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 128,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a tree.")] = 16,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the target and the draft.")] = 1.0,
) -> None:
    """Print tokens a step by the noise that candidates are ranked with."""
    loaded = load_engine(WorkerSettings(nodes=nodes), say)
    texts = encode(loaded, read_prompts(prompts, limit), max_tokens)
    table = Table("candidates ranked with", "tokens/step", "same text")
    table.title = f"{loaded.draft or 'suffix'}, {nodes} nodes, temperature {temperature:g}, {limit} prompts"
    first: TimedRun | None = None
    for name, noise in WAYS.items():
        say(f"Decoding with {name}")
        with patch("worker.drafters.candidates.gumbel_scores", noise):
            timed = decode(loaded, texts, max_tokens, Mode.PAPER, temperature)(len(texts))
        first = first or timed
        assert timed.steps
        same = "yes" if timed.token_ids == first.token_ids else "NO"
        table.add_row(name, f"{(timed.tokens - len(texts)) / timed.steps:.3f}", same)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
