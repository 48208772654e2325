"""The whole engine on random weights: tokens per second of plain decoding, and of trees whose drafts are always wrong.

    python -m worker.bench.gpu_engine --model DeepSeek-R1-Distill-Qwen-32B --draft DeepSeek-R1-Distill-Qwen-1.5B

Needs no weights. What random models write is noise, so no draft of one is ever taken by the other: OPT-Tree has to find
out that plain decoding is faster, and lose next to nothing while it does. `--draft same` is the other end: a draft with
the target's own weights, of which every token is taken.
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
from worker.engine.sampling.sampling import Sampling, noise_key
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
    """What the engine wrote at one batch size."""

    sequences: int
    tokens_per_s: dict[Mode, list[float]]  # of every run
    texts_agree: bool  # those of all modes

    @property
    def middle(self) -> dict[Mode, float]:
        """The median run of each mode."""
        return {mode: median(runs) for mode, runs in self.tokens_per_s.items()}

    @property
    def gain(self) -> float:
        """How many times the tokens of plain decoding trees wrote."""
        return self.middle[Mode.OPT_TREE] / self.middle[Mode.PLAIN]

    def as_json(self) -> str:
        """Return a line for programs."""
        runs = {str(mode): rates for mode, rates in self.tokens_per_s.items()}
        return json.dumps({"sequences": self.sequences, **runs, "texts_agree": self.texts_agree})

    def cells(self) -> list[str]:
        """Return a line of the table."""
        rates = [f"{rate:.0f}" for rate in self.middle.values()]
        return [str(self.sequences), *rates, f"{self.gain:.2f}", "yes" if self.texts_agree else "NO"]


def prompts(count: int, vocabulary: int, tokens: int) -> list[Sequence]:
    """Return sequences with prompts of random tokens, to be decoded greedily."""
    ids = np.random.default_rng(count).integers(0, vocabulary, (count, _PROMPT_TOKENS))
    greedy = Sampling(key=noise_key(0, 0))
    return [Sequence(i, row.tolist(), _PROMPT_TOKENS, tokens, greedy, frozenset()) for i, row in enumerate(ids)]


def decode(engine: Engine, sequences: list[Sequence]) -> float:
    """Decode sequences to their end and return the tokens per second behind their prompts."""
    for sequence in sequences:
        engine.add(sequence)
    while any(not sequence.output_ids for sequence in sequences):
        engine.step()
    before, started = sum(len(s.output_ids) for s in sequences), perf_counter()
    while engine.busy:
        engine.step()
    return (sum(len(s.output_ids) for s in sequences) - before) / (perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A target and its draft, ready to decode."""

    target: PackedModel
    drafts: PackedModel
    draft: str  # its name
    vocabulary: int  # of ids that both know
    options: EngineOptions
    costs: CostModel

    def measure(self, batches: Iterable[int], tokens: int, runs: int) -> Iterator[Rates]:
        """Decode at each batch size in every mode, in turns."""
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


def _random_pair(model: str, draft: str, layers: int | None, options: EngineOptions) -> _Pair:
    """Return random models of these shapes, on a GPU if there is one; raise ModelRefused if a shape is unknown."""
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
    return _Pair(target, drafts, draft, vocabulary, options, costs)


def main(
    model: Annotated[str, typer.Option(help="As for `basic plan`; no weights are read.")] = (
        "DeepSeek-R1-Distill-Qwen-1.5B"
    ),
    draft: Annotated[str, typer.Option(help="The same, or `same`: the target's own weights.")] = _SAME,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers, where memory lacks for all of them.")] = None,
    sequences: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,16,64",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that each sequence writes.")] = 96,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each mode, in turns; the median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines for programs.")] = False,
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
