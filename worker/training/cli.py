"""`basic draft`: train a draft for a target, or evaluate one."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from worker.engine.options import MAX_BLOCK_DEPTH
from worker.terminal import ProgressBars, print_message, readable_errors, settings_of
from worker.training.config import Kind, Recipe

_LOG_WIDTH = 120  # columns of a table that is not printed on a terminal

draft = typer.Typer(help="Train and evaluate drafts.", no_args_is_help=True)

Target = Annotated[str | None, typer.Option(help="Target model: a packaged name, a hub id or a directory.")]
Prompts = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="JSONL of objects with prompt. Default: prompts by the target."),
]
Seed = Annotated[int, typer.Option(help="Random seed of the texts and the weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@draft.command()
def train(
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory of the draft; run again to resume.")],
    target: Target = None,
    kind: Annotated[
        Kind,
        typer.Option(
            help="head: small network over the target's hidden states. block: the same, all depths in one forward. "
            "model: small language model."
        ),
    ] = Kind.HEAD,
    quick: Annotated[bool, typer.Option("--quick", help="Under half an hour on two CPU cores.")] = False,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of training text that the target writes.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Maximum passes over the training text.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of the draft.")] = None,
    depth: Annotated[
        int | None, typer.Option(min=2, max=MAX_BLOCK_DEPTH, help="Of a block: tokens that it foresees.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Of a block: a head of the same target to start from."),
    ] = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a draft on text that the target writes, and evaluate it on held-out text.

    Example: basic draft train --target smollm2-135m-instruct --out drafts/smollm2
    """
    from worker.benchmark import read_prompts
    from worker.training import pipeline
    from worker.training.evaluation import table

    recipe = Recipe.quick(kind, seed) if quick else Recipe(kind=kind, seed=seed)
    recipe = replace(
        recipe,
        tokens=tokens or recipe.tokens,
        epochs=epochs or recipe.epochs,
        layers=layers or recipe.layers,
        depth=depth or recipe.depth,
        start=str(start or ""),
    )
    texts = read_prompts(prompts, limit=sys.maxsize) if prompts else ()
    command = shlex.join(["basic", *sys.argv[1:]])
    with readable_errors(), ProgressBars() as bars:
        evaluation = pipeline.train_draft(settings_of(target=target), recipe, out, texts, command, bars, print_message)
    if evaluation is None:  # not the main process of an `accelerate launch`; the main process prints
        return
    print(json.dumps(evaluation.as_json())) if as_json else _console().print(table(evaluation))
    print_message(
        f"Wrote the draft to {out}. Use it with BASIC_DRAFT={out} or --draft {out}. Its card is {out / pipeline.CARD}."
    )


@draft.command(name="eval")
def evaluate(
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory of the texts and the plot.")],
    target: Target = None,
    draft: Annotated[str | None, typer.Option(help="Draft. Default: the one shipped for the target.")] = None,
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of evaluation text that the target writes.")] = 20_000,
    seed: Seed = 1,
    as_json: AsJson = False,
) -> None:
    """Evaluate a draft, together with the suffix index, on text that the target writes greedily.

    Example: basic draft eval --prompts examples/prompts.jsonl --tokens 2000 --out drafts/measured
    """
    from worker.benchmark import read_prompts
    from worker.training import pipeline
    from worker.training.evaluation import plot, table

    recipe = Recipe(seed=seed, tokens=tokens, greedy_share=1.0, held_out=0, rows=1)
    texts = read_prompts(prompts, limit=sys.maxsize) if prompts else ()
    with readable_errors(), ProgressBars() as bars:
        settings = settings_of(target=target, draft=draft)
        evaluation = pipeline.evaluate_draft(settings, recipe, out, texts, bars, print_message)
    (out / "evaluation.json").write_text(json.dumps(evaluation.as_json(), indent=2) + "\n")
    plot(evaluation, out / "reliability.png")
    print(json.dumps(evaluation.as_json())) if as_json else _console().print(table(evaluation))
    print_message(f"Wrote the reliability plot to {out / 'reliability.png'}.")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
