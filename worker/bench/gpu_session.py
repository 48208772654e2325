"""Check and measure the GPU path in one session of less than ten minutes: correctness first, then times.

    python -m worker.bench.gpu_session --output results.jsonl

Run it from a checkout, on a machine with a GPU. `--layers 2 --rows 1,4 --sequences 1,4 --vocabulary 512
--curve-layers 2 --curve-batches 1,4` is a rehearsal on a CPU.

`--split` checks and measures the ranks of a split model instead, on one GPU: the first rank's share at two, four and
eight ranks, alone and with both exchanges. `--split --layers 2 --rows 1,4` is its rehearsal.

Each stage is a process with a deadline, so that one that hangs does not cost the others. Every result is a JSON line
with the name of its stage. The floors beside the times are computed from the hardware's rates, not from earlier runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from worker.bench.gpu_steps import ExchangeKind

_ROWS = "1,64,130,192,256,512"
_CONTEXT, _LONG_CONTEXT = 800, 32_000  # tokens
_ACCEPTANCE = "0.7,0.5,0.9,smollm2-135m-head,gemma-4-31b-eagle3,0.8,0.6"  # time may end before the last
_BATCHES = "1,8,16,32,64,128"
_RANKS, _SHARE_S = (2, 4, 8), 100  # of a split model; deadline of each of their stages
_CURVE_S, _END_S = 180, 15  # deadline of the curve; what of it the last cell may take to end


@dataclass(frozen=True, slots=True)
class Stage:
    """One process of the session."""

    name: str
    deadline_s: float
    command: tuple[str, ...]  # arguments of Python; it prints JSON lines


@dataclass(frozen=True, slots=True)
class SessionSizes:
    """Sizes of what a session measures; lists are comma-separated."""

    model: str
    layers: int
    rows: str  # per step
    context: int  # tokens of each sequence
    long_context: int  # tokens of one long text
    sequences: str  # decoded together
    vocabulary: str  # ids of the rows that are drawn
    steps: int  # timed, per line
    draft: str  # of the curve of speed-ups by acceptance
    curve_layers: int | None  # of its target; None: all
    curve_batches: str


def stages(sizes: SessionSizes) -> list[Stage]:
    """Return the stages of a session; their deadlines add up to less than ten minutes."""
    steps, device = str(sizes.steps), "cuda" if torch.cuda.is_available() else "cpu"
    short = ("--layers", str(sizes.layers), "--model", sizes.model, "--json")
    times = ("-m", "worker.bench.gpu_steps", *short, "--rounds", steps, "--context", str(sizes.context))
    draws = ("-m", "worker.bench.draws", "--json", "--device", device, "--vocabulary", sizes.vocabulary)
    gap = ("-m", "worker.bench.gpu_turns", *short, "--sequences", sizes.sequences, "--steps", steps)
    return [
        Stage("correctness", 150, ("-m", "pytest", "-m", "gpu", "-q", "tests/gpu")),
        Stage("steps", 100, (*times, "--rows", sizes.rows)),
        Stage(
            "one long text", 40, (*times, "--rows", sizes.rows.split(",")[1], "--long-context", str(sizes.long_context))
        ),
        Stage("draws", 30, (*draws, "--rows", sizes.sequences)),
        Stage("gap", 90, gap),
        Stage("acceptance", _CURVE_S, _curve(sizes)),
    ]


def split_stages(sizes: SessionSizes) -> list[Stage]:
    """Return the stages that measure a split model on one GPU; their deadlines add up to less than eight minutes."""
    short = ("--layers", str(sizes.layers), "--model", sizes.model, "--json", "--rounds", str(sizes.steps))
    times = ("-m", "worker.bench.gpu_steps", *short, "--context", str(sizes.context), "--rows", sizes.rows)
    kinds = ",".join(ExchangeKind)
    return [
        Stage("correctness", 110, ("-m", "pytest", "-m", "gpu", "-q", "tests/gpu/test_shards.py")),
        Stage("whole", 60, times),
        *(Stage(f"TP {ranks}", _SHARE_S, (*times, "--ranks", str(ranks), "--exchange", kinds)) for ranks in _RANKS),
    ]


def _curve(sizes: SessionSizes) -> tuple[str, ...]:
    """Return the command of the speed-ups by acceptance."""
    layers = ("--layers", str(sizes.curve_layers)) if sizes.curve_layers else ()
    return (
        *("-m", "worker.bench.acceptance", "curve", "--json", "--model", sizes.model, "--draft", sizes.draft),
        *("--batch", sizes.curve_batches, "--acceptance", _ACCEPTANCE, *layers),
        *("--runs", "2", "--cell-s", "6", "--deadline-s", str(_CURVE_S - _END_S)),
    )


def run(stage: Stage) -> Iterator[dict[str, Any]]:
    """Run a stage; yield its results, then how it ended."""
    started = perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *stage.command], capture_output=True, text=True, timeout=stage.deadline_s, check=False
        )
        output, errors, ended = done.stdout, done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, errors, ended = _text(late.stdout), _text(late.stderr), f"stopped after {stage.deadline_s:.0f} s"
    for line in output.splitlines():
        result = _as_json(line)
        if result is not None:
            yield {"stage": stage.name, **result}
    last = (output + errors).strip().splitlines()[-3:]
    yield {"stage": stage.name, "ended": ended, "seconds": round(perf_counter() - started, 1), "last_lines": last}


def _text(captured: str | bytes | None) -> str:
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""


def _as_json(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def main(
    output: Annotated[Path | None, typer.Option(help="Also append the JSON lines to this file.")] = None,
    model: Annotated[str, typer.Option(help="Model name as for `basic plan`; no weights are read.")] = (
        "DeepSeek-R1-Distill-Qwen-32B"
    ),
    layers: Annotated[int, typer.Option(min=1, help="Layers of it, so that 512 sequences fit into memory.")] = 16,
    rows: Annotated[str, typer.Option(help="Rows per step, comma-separated; two at least.")] = _ROWS,
    context: Annotated[int, typer.Option(min=1, help="Context tokens of each sequence.")] = _CONTEXT,
    long_context: Annotated[int, typer.Option(min=1, help="Context tokens of one long text.")] = _LONG_CONTEXT,
    sequences: Annotated[str, typer.Option(help="Sequences decoded together, comma-separated.")] = "64,256",
    vocabulary: Annotated[str, typer.Option(help="Ids of the rows that are drawn.")] = "152064",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per line.")] = 20,
    draft: Annotated[str, typer.Option(help="Draft of the speed-ups by acceptance, with random weights.")] = (
        "DeepSeek-R1-Distill-Qwen-1.5B"
    ),
    curve_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the target of the speed-ups by acceptance; default: all.")
    ] = None,
    curve_batches: Annotated[str, typer.Option(help="Batch sizes of the speed-ups by acceptance.")] = _BATCHES,
    split: Annotated[bool, typer.Option("--split", help="Measure the ranks of a split model instead.")] = False,
) -> None:
    """Run all stages and print a JSON line for each result.

    Example: python -m worker.bench.gpu_session --output results.jsonl
    """
    if rows.count(",") < 1:
        raise typer.BadParameter("--rows needs two numbers at least, comma-separated")
    curve = (draft, curve_layers, curve_batches)
    sizes = SessionSizes(model, layers, rows, context, long_context, sequences, vocabulary, steps, *curve)
    for stage in split_stages(sizes) if split else stages(sizes):
        for result in run(stage):
            line = json.dumps(result)
            print(line, flush=True)
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    typer.run(main)
