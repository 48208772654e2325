"""Measure speed-up by acceptance and batch with random weights, or record the acceptance of a real pair.

python -m worker.bench.acceptance curve --model DeepSeek-R1-Distill-Qwen-32B --draft DeepSeek-R1-Distill-Qwen-1.5B
python -m worker.bench.acceptance record --out smollm2-135m-head.json
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.errors import InvalidValue
from worker.bench.acceptance import command
from worker.benchmark import parse_batches, read_prompts
from worker.engine.errors import ModelRefused
from worker.terminal import ProgressBars, print_message, readable_errors, settings_of

app = typer.Typer(no_args_is_help=True)


@app.command()
def curve(
    model: Annotated[
        str, typer.Option(help="Packaged name, directory with a config.json, or hub id; no weights are read.")
    ] = "smollm2-135m-instruct",
    draft: Annotated[
        str, typer.Option(help="A model like the target, the directory of a head, or head: one that fits the target.")
    ] = "head",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the target, if not all fit into memory.")] = None,
    acceptance: Annotated[
        str, typer.Option(help="Rates of the first candidate and profiles (names or files), comma-separated.")
    ] = command.ALL,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = ",".join(map(str, command.BATCHES)),
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 96,
    runs: Annotated[int, typer.Option(min=1, help="Runs of a cell; the median of those after the first is shown.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the draws from the profiles.")] = 0,
    cell_s: Annotated[float, typer.Option(min=0.1, help="Max seconds of one cell.")] = 60.0,
    deadline_s: Annotated[float | None, typer.Option(min=1.0, help="Max seconds of all, loading included.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the curve as a PNG.")] = None,
) -> None:
    """Print the speed-up of draft trees over plain decoding by acceptance and batch. Exit status 1: a text differs.

    Example: python -m worker.bench.acceptance curve --acceptance 0.5,0.7,0.9 --batch 1,8
    """
    try:
        options = command.CurveOptions(
            model,
            draft,
            acceptance,
            parse_batches(batch),
            tokens,
            runs,
            seed,
            layers,
            cell_s,
            deadline_s,
            as_json,
            plot,
        )
        status = command.run(options, print_message)
    except (InvalidValue, ModelRefused) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(status)


@app.command()
def record(
    out: Annotated[Path, typer.Option(dir_okay=False, help="File of the profile, named as the profile.")],
    work: Annotated[Path, typer.Option(file_okay=False, help="Directory of texts and hidden states, to resume.")],
    target: Annotated[str | None, typer.Option(help="Target model: a packaged name, a hub id or a directory.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft. Default: the one shipped for the target.")] = None,
    prompts: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="JSONL file of prompts.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text that the target writes greedily.")] = 6_000,
    nodes: Annotated[int, typer.Option(min=1, help="Draft nodes per step.")] = 60,
) -> None:
    """Record ranks and probabilities, by depth, of what a draft offers while the target's own text is replayed.

    Example: python -m worker.bench.acceptance record --prompts examples/prompts.jsonl --work /tmp/work --out pair.json
    """
    from worker.bench.acceptance.record_pair import record_pair

    texts = read_prompts(prompts, limit=sys.maxsize) if prompts else ()
    said = f"python -m worker.bench.acceptance {shlex.join(sys.argv[1:])}"
    with readable_errors(), ProgressBars() as bars:
        profile = record_pair(settings_of(target=target, draft=draft), out.stem, texts, tokens, nodes, work, said, bars)
    out.write_text(json.dumps(profile) + "\n", encoding="utf-8")
    print_message(f"Wrote the acceptance profile to {out}.")


if __name__ == "__main__":
    app()
