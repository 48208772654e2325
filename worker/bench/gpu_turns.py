"""Measure how long a GPU waits for the host: the time of an engine's step minus the device's work in it.

    python -m worker.bench.gpu_turns --model DeepSeek-R1-Distill-Qwen-32B --layers 16

Random weights, greedy and sampled rows, plain decoding. A step counts until its results are serialised for the process
that writes texts. On a CPU the device's work is the time of the forward.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.errors import InvalidValue
from worker.bench.gpu_steps import random_model
from worker.benchmark import parse_batches
from worker.engine.engine import Engine
from worker.engine.errors import ModelRefused
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sequence import Sequence
from worker.planning.shapes import load_config
from worker.serving.resilient_engine import ResilientEngine

_PROMPT_TOKENS = 64
_SAMPLED = {"temperature": 0.6, "top_p": 0.95}


@dataclass(frozen=True, slots=True)
class Turns:
    """Steps of one kind."""

    sequences: int
    sampled: bool
    turn_ms: float  # median wall time of a step and its hand-over
    device_ms: float  # the device's work in a step
    gap_ms: float  # the rest: the device waits for the host


def measure(packed: PackedModel, options: EngineOptions, sequences: int, sampled: bool, steps: int) -> Turns:
    """Decode `steps` steps of `sequences` sequences that are past their prompts."""
    options = EngineOptions(**{**asdict(options), "mode": Mode.PLAIN, "max_sequences": sequences})
    engine = ResilientEngine(lambda: Engine(packed, None, options))
    texts = _sequences(sequences, packed.config.vocab_size, sampled, options.max_context - _PROMPT_TOKENS)
    for text in texts:
        engine.add(text)
    while any(text.prefilling for text in texts):
        engine.step()

    def turn() -> None:
        pickle.dumps(engine.step()[0], pickle.HIGHEST_PROTOCOL)

    turn()
    turn_ms = []
    for _ in range(steps):
        started = perf_counter()
        turn()
        turn_ms.append((perf_counter() - started) * 1e3)
    on_gpu = torch.cuda.is_available()
    device_ms = _kernel_ms(turn, steps) if on_gpu else _forward_ms(packed, turn, steps)
    whole_ms = median(turn_ms)
    return Turns(sequences, sampled, whole_ms, device_ms, whole_ms - device_ms)


def _kernel_ms(turn: Callable[[], None], steps: int) -> float:
    """Return the ms of all kernels and copies of a step on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            turn()
        torch.cuda.synchronize()
    return sum(float(event.self_device_time_total) for event in profile.key_averages()) / 1e3 / steps


def _forward_ms(packed: PackedModel, turn: Callable[[], None], steps: int) -> float:
    """Return the median ms of the forward of a step."""
    forward, spent_ms = packed.forward, []

    def timed(segments: Any) -> torch.Tensor:
        started = perf_counter()
        logits = forward(segments)
        spent_ms.append((perf_counter() - started) * 1e3)
        return logits

    with patch.object(packed, "forward", timed):
        for _ in range(steps):
            turn()
    return median(spent_ms)


def _sequences(count: int, vocabulary: int, sampled: bool, max_tokens: int) -> list[Sequence]:
    ids = np.random.default_rng(0).integers(0, vocabulary, (count, _PROMPT_TOKENS)).tolist()
    given: dict[str, Any] = _SAMPLED if sampled else {}
    return [
        Sequence(index, ids[index], _PROMPT_TOKENS, max_tokens, Sampling(key=noise_key(0, index), **given))
        for index in range(count)
    ]


def main(
    model: Annotated[str, typer.Option(help="Model name as for `basic plan`; no weights are read.")] = (
        "DeepSeek-R1-Distill-Qwen-32B"
    ),
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers, if not all fit into memory.")] = None,
    sequences: Annotated[str, typer.Option(help="Sequences decoded together, comma-separated.")] = "64,256",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per line.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure the time of a step, the device's work in it, and the gap between the two.

    Example: python -m worker.bench.gpu_turns --layers 16 --sequences 64,256
    """
    try:
        batches = parse_batches(sequences)
        config = load_config(model)
    except (InvalidValue, ModelRefused) as error:
        raise typer.BadParameter(str(error)) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = random_model(config, layers, device)
    fuse_layers(network)
    context = _PROMPT_TOKENS + 3 * (2 * steps + 10)
    options = EngineOptions(max_sequences=max(batches), max_context=context, prefill_rows=2048)
    packed = PackedModel(network, slots=max(batches), capacity=options.slot_tokens)
    packed.prepare()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    table = Table("sequences", "draws", "turn ms", "device ms", "gap ms", title=f"{model}, {name}")
    for count in batches:
        for sampled in (False, True):
            found = measure(packed, options, count, sampled, steps)
            if as_json:
                line = {"model": model, "layers": config.num_hidden_layers, "device": name, **asdict(found)}
                print(json.dumps(line), flush=True)
            times = (f"{ms:.2f}" for ms in (found.turn_ms, found.device_ms, found.gap_ms))
            table.add_row(str(count), "sampled" if sampled else "greedy", *times)
    if not as_json:
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
