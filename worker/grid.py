"""The grid: does speculation ever cost anything? Plain, opt-tree and paper at every batch size, draft and temperature.

`basic bench --grid` prints it. Four drafts stand for what may happen: `shipped` is the one that comes with the target,
`suffix` what runs without a draft model, `random` a model of random weights that is wrong all the time and costs its
forwards, `replay` one that knows the text, is right four times in five and costs nothing. Modes take turns within a
run, and medians count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from worker.assembly import Assembly, Say, assemble
from worker.benchmark import Result, Runner, decode, encode, load_peer, peer, take_turns
from worker.drafters.model import ModelDrafter
from worker.drafters.suffix import SuffixDrafter
from worker.engine.attention import ATTENTION_NAME
from worker.engine.draft_tree import Candidates, Forest
from worker.engine.drafting import Drafter
from worker.engine.language_model import PackedModel, quicken
from worker.engine.options import Mode
from worker.engine.rows import IntArray
from worker.engine.sampling import noise_key
from worker.engine.sequence import Sequence as EngineSequence
from worker.pull import resolve
from worker.settings import WorkerSettings

BATCHES = (1, 2, 4, 8, 16, 32, 64)
TEMPERATURES = (0.0, 1.0)
SHIPPED = "shipped"
DRAFTS = ("replay", "random", "suffix")
_RIGHT = 0.8  # of the tokens that the replay drafter offers
_LEAST_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: tokens per second, medians of the runs."""

    batch: int
    temperature: float
    drafter: str
    plain: float
    opt_tree: float
    paper: float
    transformers: float | None  # its own greedy generate, padded; None above temperature 0
    runs: int

    def results(self) -> list[Result]:
        """Return the cell as rows of a report."""
        rates = {Mode.PLAIN: self.plain, Mode.OPT_TREE: self.opt_tree, Mode.PAPER: self.paper}
        return [
            Result(mode.value, self.batch, self.temperature, self.drafter, round(rate, 2), None, self.runs, (), None)
            for mode, rate in rates.items()
        ]


def run(
    settings: WorkerSettings, prompts: Sequence[str], batches: Sequence[int], max_tokens: int, runs: int, say: Say
) -> list[Cell]:
    """Measure every cell."""
    assembly = assemble(settings, say)
    texts = encode(assembly, prompts, max_tokens)
    random = _random_draft(assembly)
    transformers = load_peer(resolve(settings.target, settings.cache_dir), assembly)
    cells: list[Cell] = []
    for batch in batches:
        some = [texts[i % len(texts)] for i in range(max(batch, _LEAST_PROMPTS))]
        for temperature in TEMPERATURES:
            say(f"Batch {batch}, temperature {temperature:g}")
            runners = _runners(assembly, some, max_tokens, temperature, random)
            if temperature == 0.0:
                runners["transformers"] = peer(transformers, assembly, some, max_tokens, temperature)
            taken = take_turns(runners, batch, runs)
            rates = {name: median(timed.rate for timed in of) for name, of in taken.items()}
            for drafter in [name.removeprefix("opt-tree ") for name in rates if name.startswith("opt-tree ")]:
                ours = (rates["plain"], rates[f"opt-tree {drafter}"], rates[f"paper {drafter}"])
                cells.append(Cell(batch, temperature, drafter, *ours, rates.get("transformers"), runs))
    return cells


def _runners(
    assembly: Assembly, prompts: list[list[int]], max_tokens: int, temperature: float, random: PackedModel
) -> dict[str, Runner]:
    """Return what decodes the prompts in each way; the replay draft learns the text from a plain run first."""
    known = decode(assembly, prompts, max_tokens, Mode.PLAIN, temperature)(len(prompts)).token_ids
    vocab = len(assembly.codec.tokenizer)
    drafts: dict[str, Callable[[], Drafter]] = {
        "replay": lambda: ReplayDrafter(known),
        "random": lambda: ModelDrafter(random, "random", vocab),
        "suffix": SuffixDrafter,
    }
    if assembly.draft:
        drafts = {SHIPPED: assembly.make_drafter, **drafts}
    runners = {"plain": decode(assembly, prompts, max_tokens, Mode.PLAIN, temperature)}
    for name in drafts:
        for mode in (Mode.OPT_TREE, Mode.PAPER):
            runners[f"{mode.value} {name}"] = decode(assembly, prompts, max_tokens, mode, temperature, drafts[name])
    return runners


def _random_draft(assembly: Assembly) -> PackedModel:
    """Return a model of the target's kind with a fifteenth of its layers and random weights."""
    config = assembly.target.config
    shape = {**config.to_dict(), "num_hidden_layers": max(config.num_hidden_layers // 15, 1), "layer_types": None}
    small = type(config)(**shape)
    dtype = assembly.target.dtype
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        small, dtype=dtype, attn_implementation=ATTENTION_NAME
    ).eval()
    quicken(model)
    return PackedModel(model, slots=assembly.options.max_sequences, capacity=assembly.options.draft_slot_tokens)


class ReplayDrafter:
    """Offers what a plain run has written, wrong now and then: as good a draft as one could train, and free."""

    name = "replay"
    free = None  # it has no other part

    def __init__(self, known: Sequence[Sequence[int]]) -> None:
        """Take the known output of each sequence, by its key."""
        self._known = known

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer one token below each node."""
        tokens = np.zeros((len(frontier), 1), np.int64)
        for row, node in enumerate(frontier.tolist()):
            sequence = forest.sequences[forest.tree[node]]
            assert isinstance(sequence.key, int)
            known = (
                self._known[sequence.key] if sequence.key < len(self._known) else ()
            )  # what is timed, it doesn't know
            place = len(sequence.ids) - sequence.num_prompt + int(forest.depth[node])
            right = noise_key(sequence.key, place) % 100 < 100 * _RIGHT  # each place by itself
            tokens[row] = known[place] if place < len(known) and right else 0
        return Candidates(tokens, np.full(tokens.shape, _RIGHT))

    def behind(self, sequence: EngineSequence) -> int:
        """It reads nothing."""
        return 0

    def keep(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """It has no state."""

    def drop(self, sequence: EngineSequence) -> None:
        """It has no state."""


def table(assembly_line: str, cells: Sequence[Cell]) -> Table:
    """Return the grid with the ratios that must hold."""
    shown = Table(title=assembly_line)
    columns = ("batch", "T", "draft", "plain tokens/s", "opt-tree/plain", "paper/plain", "plain/transformers")
    for column in columns:
        shown.add_column(column, justify="right")
    for c in cells:
        peer_ratio = f"{c.plain / c.transformers:.2f}" if c.transformers else "-"
        shown.add_row(
            str(c.batch),
            f"{c.temperature:g}",
            c.drafter,
            f"{c.plain:.1f}",
            f"{c.opt_tree / c.plain:.2f}",
            f"{c.paper / c.plain:.2f}",
            peer_ratio,
        )
    return shown
