"""Measure the whole engine on random weights: tokens per second, plain and with draft trees.

    python -m worker.bench.gpu_engine --model DeepSeek-R1-Distill-Qwen-32B --draft DeepSeek-R1-Distill-Qwen-1.5B

Reads no weights. A random draft model is always wrong: OPT-Tree must detect that plain decoding is faster and lose
almost nothing meanwhile. `--draft same` is the opposite case: the draft has the target's weights, and every draft
token is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.errors import InvalidValue
from worker.bench.gpu_steps import random_model
from worker.benchmark import parse_batches
from worker.drafters.model import ModelDrafter
from worker.engine.engine import Engine
from worker.engine.errors import ModelRefused
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sequence import Sequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.state import SpeculationState
from worker.loading.calibration import calibrate
from worker.planning.shapes import load_config

_PROMPT_TOKENS = 64
_MODES = (Mode.PLAIN, Mode.OPT_TREE, Mode.PAPER)
_SAME = "same"


@dataclass(frozen=True, slots=True)
class Rates:
    """Throughput of every mode at one batch size."""

    sequences: int
    tokens_per_s: dict[Mode, list[float]]  # of each run
    texts_agree: bool  # all modes wrote the same texts

    @property
    def medians(self) -> dict[Mode, float]:
        """The median run of each mode."""
        return {mode: median(runs) for mode, runs in self.tokens_per_s.items()}

    @property
    def gain(self) -> float:
        """Speed-up of draft trees over plain decoding."""
        return self.medians[Mode.OPT_TREE] / self.medians[Mode.PLAIN]

    def as_json(self) -> str:
        """Return the result as a JSON line."""
        runs = {str(mode): rates for mode, rates in self.tokens_per_s.items()}
        return json.dumps({"sequences": self.sequences, **runs, "texts_agree": self.texts_agree})

    def cells(self) -> list[str]:
        """Return the result as a table row."""
        rates = [f"{rate:.0f}" for rate in self.medians.values()]
        return [str(self.sequences), *rates, f"{self.gain:.2f}", "yes" if self.texts_agree else "NO"]


def prompts(count: int, vocabulary: int, tokens: int) -> list[Sequence]:
    """Return sequences with random prompts, for greedy decoding."""
    ids = np.random.default_rng(count).integers(0, vocabulary, (count, _PROMPT_TOKENS))
    greedy = Sampling(key=noise_key(0, 0))
    return [Sequence(i, row.tolist(), _PROMPT_TOKENS, tokens, greedy, frozenset()) for i, row in enumerate(ids)]


def decode(engine: Engine, sequences: list[Sequence]) -> float:
    """Decode sequences to the end; return the tokens per second after the first token of all of them."""
    for sequence in sequences:
        engine.add(sequence)
    while any(not sequence.output_ids for sequence in sequences):
        engine.step()
    before, started = sum(len(s.output_ids) for s in sequences), perf_counter()
    while engine.busy:
        engine.step()
    return (sum(len(s.output_ids) for s in sequences) - before) / (perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _ModelPair:
    """A target and its draft, both with random weights."""

    target: PackedModel
    drafts: PackedModel
    draft: str  # name of the draft
    vocabulary: int  # number of token ids that both have
    options: EngineOptions
    costs: CostModel

    def measure(self, batches: Iterable[int], tokens: int, runs: int) -> Iterator[Rates]:
        """Decode at each batch size in every mode; the modes alternate."""
        states = {mode: SpeculationState() for mode in _MODES}
        for batch in batches:
            rates: dict[Mode, list[float]] = {mode: [] for mode in _MODES}
            texts: dict[Mode, list[list[int]]] = {}
            for _ in range(runs):
                for mode in _MODES:
                    some = prompts(batch, self.vocabulary, tokens)
                    rates[mode].append(decode(self._engine(mode, batch, states[mode]), some))
                    texts[mode] = [sequence.output_ids for sequence in some]
            yield Rates(batch, rates, all(texts[mode] == texts[Mode.PLAIN] for mode in _MODES))

    def _engine(self, mode: Mode, batch: int, state: SpeculationState) -> Engine:
        drafter: Drafter | None = None
        if mode is not Mode.PLAIN:
            drafter = ModelDrafter(self.drafts, self.draft, self.vocabulary)
        options = replace(self.options, mode=mode, max_sequences=batch)
        return Engine(self.target, drafter, options, self.costs, state)


def _random_pair(model: str, draft: str, layers: int | None, options: EngineOptions) -> _ModelPair:
    """Return random models of these shapes, on the GPU if there is one. Raises ModelRefused for unknown shapes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = random_model(load_config(model), layers, device)
    drafting = network if draft == _SAME else random_model(load_config(draft), layers, device)
    for one in {network, drafting}:
        fuse_layers(one)
    vocabulary = min(network.config.vocab_size, drafting.config.vocab_size)
    slots = options.max_sequences
    target = PackedModel(network, slots=slots, capacity=options.slot_tokens, defined_ids=vocabulary)
    drafts = PackedModel(drafting, slots=slots, capacity=options.draft_slot_tokens)
    target.prepare()
    drafts.prepare()
    with TemporaryDirectory() as folder:
        costs = calibrate(target, options.slot_tokens, (), Path(folder))
    return _ModelPair(target, drafts, draft, vocabulary, options, costs)


def main(
    model: Annotated[str, typer.Option(help="Model name as for `basic plan`; no weights are read.")] = (
        "DeepSeek-R1-Distill-Qwen-1.5B"
    ),
    draft: Annotated[str, typer.Option(help="Model name, or `same`: the target's weights.")] = _SAME,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers, if not all fit into memory.")] = None,
    sequences: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,16,64",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 96,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each mode; the median is reported.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Decode random prompts with random weights, plain and with trees, and print tokens/s and whether texts agree."""
    try:
        batches = parse_batches(sequences)
    except InvalidValue as error:
        raise typer.BadParameter(error.message) from None
    options = EngineOptions(max_sequences=max(batches), max_context=_PROMPT_TOKENS + tokens)
    try:
        pair = _random_pair(model, draft, layers, options)
    except ModelRefused as refusal:
        raise typer.BadParameter(str(refusal)) from None
    table = Table("sequences", *(f"{mode} tokens/s" for mode in _MODES), "opt-tree / plain", "texts agree")
    for rates in pair.measure(batches, tokens, runs):
        if as_json:
            print(rates.as_json())
        table.add_row(*rates.cells())
    if not as_json:
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
