"""`basic draft`: train a draft for a target, and say what one is worth."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from worker.terminal import ProgressBars, readable_errors, say, settings_of
from worker.training.config import Kind, Recipe

_LOG_WIDTH = 120  # columns of a table that goes to a file

draft = typer.Typer(help="Drafts: train one for any target, and say what it is worth.", no_args_is_help=True)

Target = Annotated[str | None, typer.Option(help="Target model: a packaged name, a hub id or a directory.")]
Prompts = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="JSONL of objects with prompt; left out: the target asks itself."),
]
Seed = Annotated[int, typer.Option(help="Same seed, same texts and weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@draft.command()
def train(
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the draft goes; run again to go on.")],
    target: Target = None,
    kind: Annotated[Kind, typer.Option(help="head: small, reads the target's states; model: of its own.")] = Kind.HEAD,
    quick: Annotated[bool, typer.Option("--quick", help="Under half an hour on two CPU cores.")] = False,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that the target writes to learn from.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Times that the draft goes through them at most.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the draft.")] = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a draft from what the target itself writes, and measure it on texts held out.

    Example: basic draft train --target smollm2-135m-instruct --out drafts/smollm2
    """
    from worker.benchmark import read_prompts
    from worker.training import pipeline
    from worker.training.evaluation import table

    recipe = Recipe.quick(kind, seed) if quick else Recipe(kind=kind, seed=seed)
    recipe = replace(
        recipe, tokens=tokens or recipe.tokens, epochs=epochs or recipe.epochs, layers=layers or recipe.layers
    )
    texts = read_prompts(prompts, limit=sys.maxsize) if prompts else ()
    command = shlex.join(["basic", *sys.argv[1:]])
    with readable_errors(), ProgressBars() as bars:
        evaluation = pipeline.train_draft(settings_of(target=target), recipe, out, texts, command, bars, say)
    if evaluation is None:  # one of several processes; the first of them speaks
        return
    print(json.dumps(evaluation.as_json())) if as_json else _console().print(table(evaluation))
    say(f"The draft lies in {out}; use it with BASIC_DRAFT={out} or --draft {out}. Its card is {out / pipeline.CARD}.")


@draft.command(name="eval")
def evaluate(
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the texts and the plot go.")],
    target: Target = None,
    draft: Annotated[str | None, typer.Option(help="Draft; left out: the one that comes with the target.")] = None,
    prompts: Prompts = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that the target writes to measure on.")] = 20_000,
    seed: Seed = 1,
    as_json: AsJson = False,
) -> None:
    """Measure a draft, with the suffix index as jobs have it, on texts that the target writes greedily.

    Example: basic draft eval --prompts examples/prompts.jsonl --tokens 2000 --out drafts/measured
    """
    from worker.benchmark import read_prompts
    from worker.training import pipeline
    from worker.training.evaluation import plot, table

    recipe = Recipe(seed=seed, tokens=tokens, greedy_share=1.0, held_out=0, rows=1)
    texts = read_prompts(prompts, limit=sys.maxsize) if prompts else ()
    with readable_errors(), ProgressBars() as bars:
        settings = settings_of(target=target, draft=draft)
        evaluation = pipeline.evaluate_draft(settings, recipe, out, texts, bars, say)
    (out / "evaluation.json").write_text(json.dumps(evaluation.as_json(), indent=2) + "\n")
    plot(evaluation, out / "reliability.png")
    print(json.dumps(evaluation.as_json())) if as_json else _console().print(table(evaluation))
    say(f"The reliability plot is {out / 'reliability.png'}.")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
