"""Commands of `basic` that need torch, loaded through the entry point group `basic.commands`.

Settings come from the environment; options on the command line take precedence. Each command imports torch itself, so
that `basic --help` stays fast.
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
from worker.loading.cli import models
from worker.planning.cli import plan
from worker.settings import WorkerSettings
from worker.terminal import print_message, readable_errors, settings_of
from worker.training.cli import draft

if TYPE_CHECKING:
    from worker.generate import Generation
    from worker.text.stop_strings import Pieces

_GRID_PROMPTS = 64
_LOG_WIDTH = 120  # columns of a table that is written to a file

commands = typer.Typer()
commands.add_typer(models, name="models")
commands.add_typer(draft, name="draft")
commands.command()(plan)

Target = Annotated[
    str | None, typer.Option(help="Target model: a packaged name, a hub id, a directory or a GGUF file.")
]
Targets = Annotated[
    str | None,
    typer.Option(
        help="Target model: a packaged name, a hub id, a directory (also of a LoRA adapter) or a GGUF file; several, "
        "with commas, share a device."
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(help="Draft: a directory, a hub id, or suffix; default: the one shipped with the target."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Max nodes of one draft tree.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@commands.command()
def worker(
    target: Targets = None,
    draft: Draft = None,
    dtype: Dtype = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=0, help="Worker processes, each with its own GPUs and CPUs; 0: as many as the GPUs hold."),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Tensor-parallel ranks (GPUs or processes) of each replica.")
    ] = None,
    generation_config: Annotated[
        str | None, typer.Option(help="auto: sampling defaults of the model's generation_config.json; off: of the API.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="auto, off, or whose markers split the reasoning from the content.")
    ] = None,
) -> None:
    """Load the models and serve jobs until a signal: in this process, or in supervised replicas.

    Example: basic worker --target smollm2-135m-instruct --replicas 2

    Example: basic worker --target smollm2-135m-instruct,./adapters/french
    """
    from worker.start import run

    settings = settings_of(
        target=target,
        draft=draft,
        dtype=dtype,
        replicas=replicas,
        tp=tp,
        generation_config=generation_config,
        reasoning_parser=reasoning_parser,
    )
    raise typer.Exit(run(settings))


@commands.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Prompt; - reads standard input.")],
    mode: Annotated[str | None, typer.Option(help="plain, opt-tree or paper.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Max tokens of the answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Sampling temperature; 0 is greedy.")
    ] = TOOLS_TEMPERATURE,
    seed: Annotated[int, typer.Option(help="Sampling seed: the same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this string; repeatable.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="Log-probabilities with this number of alternatives per token; needs --json."),
    ] = None,
    schema: Annotated[Path | None, typer.Option(dir_okay=False, exists=True, help="JSON schema of the answer.")] = None,
    nodes: Nodes = None,
    target: Target = None,
    draft: Draft = None,
    dtype: Dtype = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the prompt without the chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt in this process, without servers; accepted draft tokens are printed in green.

    Example: basic generate "What is the capital of France?" --max-tokens 50 --json

    Example: basic generate "Describe Ada Lovelace." --schema person.schema.json
    """
    from jobs.client.response_format import schema_file
    from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT
    from jobs.submission.parameters.grammar import read_grammar
    from worker.generate import generate as decode
    from worker.generate import request_for
    from worker.loading.loader import load_engine

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InvalidValue("the prompt is empty", param="PROMPT")
    if logprobs is not None and not as_json:
        raise InvalidValue("log-probabilities need --json", param="--logprobs")
    grammar = None if schema is None else read_grammar({"response_format": schema_file(schema)}, CHAT_ENDPOINT)
    # One prompt needs one KV slot and calibration for one sequence.
    settings = settings_of(target=target, draft=draft, dtype=dtype, mode=mode, nodes=nodes, max_sequences=1)
    console = Console(highlight=False)
    with readable_errors():
        loaded = load_engine(settings, on_message=print_message)
        request = request_for(
            loaded.name,
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop or (),
            logprobs=logprobs,
            grammar=grammar,
        )
        endpoint = COMPLETIONS_ENDPOINT if raw else CHAT_ENDPOINT
        generation = decode(
            loaded, request, endpoint=endpoint, on_pieces=_print_nothing if as_json else _print_colored(console)
        )
    print(json.dumps(generation.as_json())) if as_json else console.print(f"\n{_summary(generation)}", style="dim")


@commands.command()
def bench(
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSONL file of objects with `prompt`.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes, comma-separated; default: 1, with --grid 1 to 64.")
    ] = None,
    modes: Annotated[str | None, typer.Option(help="Modes, comma-separated; default: all.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Max tokens of each answer.")] = 128,
    limit: Annotated[int, typer.Option(min=1, help="Max number of prompts.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each mode; the median is reported.")] = 3,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature; 0 is greedy.")] = 0.0,
    grid: Annotated[
        bool, typer.Option(help="Every batch size, draft and temperature: find cases where plain decoding is faster.")
    ] = False,
    acceptance: Annotated[
        str | None,
        typer.Option(
            help="Speed-up by acceptance and batch size, with random weights of the shapes of --target and --draft: "
            "rates such as 0.7 and names of recorded profiles, comma-separated, or all."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="With --acceptance: also write the curve as a PNG.")
    ] = None,
    target: Target = None,
    draft: Draft = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second next to transformers' generate, in one run with the same dtype and threads.

    Example: basic bench --prompts examples/prompts.jsonl --batch 1,8 --max-tokens 64

    Example: basic bench --acceptance 0.5,0.7,0.9 --batch 1,8,16
    """
    from worker import benchmark

    if acceptance is not None:
        if grid or modes or prompts or temperature or dtype:
            raise typer.BadParameter(
                "--acceptance compares plain and opt-tree on random prompts at temperature 0; remove --grid, --modes, "
                "--prompts, --temperature and --dtype",
                param_hint="--acceptance",
            )
        raise typer.Exit(_acceptance(target, draft, acceptance, batch, max_tokens, runs, as_json, plot))
    if plot is not None:
        raise typer.BadParameter("--plot needs --acceptance", param_hint="--plot")
    if grid:
        if modes or draft or temperature:
            raise typer.BadParameter(
                "--grid covers all modes, drafts and temperatures; remove those options", param_hint="--grid"
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
        report = benchmark.run(settings, plan, on_message=print_message)
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
        cells = grid.run(settings, prompts, batches, max_tokens, runs, print_message)
    if as_json:
        print(json.dumps({"target": settings.target, "results": [asdict(r) for c in cells for r in c.results()]}))
        return
    width = None if sys.stdout.isatty() else _LOG_WIDTH
    title = f"{settings.target}, {max_tokens} tokens, medians of at least {runs} interleaved runs"
    Console(width=width).print(grid.table(title, cells))


def _acceptance(
    target: str | None,
    draft: str | None,
    acceptance: str,
    batch: str | None,
    max_tokens: int,
    runs: int,
    as_json: bool,
    plot: Path | None,
) -> int:
    from worker.bench.acceptance import command, pair
    from worker.benchmark import parse_batches

    with readable_errors():
        batches = parse_batches(batch) if batch else command.BATCHES
        options = command.CurveOptions(
            model=target or WorkerSettings().target,
            draft=draft or pair.HEAD,
            acceptance=acceptance,
            batches=batches,
            tokens=max_tokens,
            runs=runs,
            as_json=as_json,
            plot=plot,
        )
        return command.run(options, print_message)


def _print_nothing(_: Pieces) -> None:
    """Print nothing: JSON is printed at the end."""


def _print_colored(console: Console) -> Any:
    def show(pieces: Pieces) -> None:
        for text, source in pieces:
            console.print(safe(text), end="", markup=False, style="green" if source == "draft" else None)

    return show


def _summary(generation: Generation) -> str:
    steps = generation.steps[1:]
    decode_s = sum(step.step_ms for step in steps) / 1e3
    tokens = sum(step.emitted_tokens for step in steps)
    rate = f", {tokens / decode_s:.1f} tokens/s, {tokens / len(steps):.2f} tokens per step" if steps else ""
    tokens_in_steps = f"{len(generation.token_ids)} tokens in {len(generation.steps)} steps"
    return f"{tokens_in_steps}{rate}, finish reason {generation.finish_reason}"
