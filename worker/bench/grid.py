"""The grid: does speculation ever cost anything? Plain, opt-tree and paper at every batch size, draft and temperature.

`basic bench --grid` prints it. Four drafts stand for what may happen: `shipped` is the one that comes with the target,
`suffix` what runs without a draft model, `random` a model of random weights that is wrong all the time and costs its
forwards, `replay` one that knows the text, is right four times in five and costs nothing. Each mode races against plain
decoding, for machines change their speed; the median of the races counts, and short ones are run more often. The
paper's trees, slow where they don't pay, are measured as often only where they come near. A draft's state goes
through the whole grid, as it goes through the life of a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from worker.bench.interleaved import SlotRange, run_interleaved
from worker.benchmark import Result, decode, encode, fresh, load_peer, peer
from worker.drafters.model import ModelDrafter
from worker.drafters.suffix import SuffixDrafter
from worker.engine.engine import Engine
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.sampling.sampling import noise_key
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.state import SpeculationState
from worker.loading.loader import LoadedModel, load_engine
from worker.loading.model_store import OnMessage, resolve
from worker.settings import WorkerSettings

BATCHES = (1, 2, 4, 8, 16, 32, 64)
TEMPERATURES = (0.0, 1.0)
SHIPPED = "shipped"
Texts = Sequence[Sequence[int]]
MakeDraft = Callable[[Texts], Drafter]  # from what plain decoding wrote
_RIGHT = 0.8  # of the tokens that the replay drafter offers
_LEAST_PROMPTS = 8
_CELL_S = 6.0  # seconds of plain decoding that the races of a cell take together, if the least number is not longer
_NEAR = 0.9  # of our speed, from which on the paper's trees are looked at as closely
_PEER_RUNS = 3  # of transformers, which takes longest


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid."""

    batch: int
    temperature: float
    drafter: str
    plain: float  # tokens per second, median of the races
    opt_tree: float  # times plain, median of the races
    paper: float  # times plain
    transformers: float | None  # its own greedy generate, padded, in tokens per second; None above temperature 0
    runs: int

    def results(self) -> list[Result]:
        """Return the cell as rows of a report."""
        times = {Mode.PLAIN: 1.0, Mode.OPT_TREE: self.opt_tree, Mode.PAPER: self.paper}
        rates = {mode: ratio * self.plain for mode, ratio in times.items()}
        return [
            Result(mode.value, self.batch, self.temperature, self.drafter, round(rate, 2), None, self.runs, (), None)
            for mode, rate in rates.items()
        ]


def run(
    settings: WorkerSettings, prompts: Sequence[str], batches: Sequence[int], max_tokens: int, runs: int, say: OnMessage
) -> list[Cell]:
    """Measure every cell, in `runs` races or more."""
    loaded = load_engine(settings.model_copy(update={"max_sequences": 2 * max(batches)}), say)  # two engines at a time
    texts = encode(loaded, prompts, max_tokens)
    drafts = _drafts(loaded)
    states = {name: loaded.initial_state(partial(make, ())) for name, make in drafts.items()}
    transformers = load_peer(resolve(settings.target, settings.cache_dir), loaded)
    cells: list[Cell] = []
    for batch in batches:
        some = [texts[i % len(texts)] for i in range(max(batch, _LEAST_PROMPTS))]
        for temperature in TEMPERATURES:
            say(f"Batch {batch}, temperature {temperature:g}")
            peers = peer(transformers, loaded, some, max_tokens, temperature) if temperature == 0.0 else None
            theirs = median(peers(batch).rate for _ in range(min(runs, _PEER_RUNS))) if peers else None
            case = _Case(loaded, some, max_tokens, temperature, batch, drafts, states)
            cells += case.measure(runs, theirs, say)
    return cells


def _drafts(loaded: LoadedModel) -> dict[str, MakeDraft]:
    """Return the drafts of the grid by name."""
    random, vocab = _random_draft(loaded), len(loaded.codec.tokenizer)
    drafts: dict[str, MakeDraft] = {
        "replay": ReplayDrafter,
        "random": lambda _: ModelDrafter(random, "random", vocab),
        "suffix": lambda _: SuffixDrafter(),
    }
    return {SHIPPED: lambda _: loaded.make_drafter(), **drafts} if loaded.draft else drafts


class _Case:
    """The prompts at one batch size and temperature."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float,
        batch: int,
        drafts: Mapping[str, MakeDraft],
        states: Mapping[str, SpeculationState],
    ) -> None:
        self._loaded, self._batch, self._temperature = loaded, batch, temperature
        self._fresh = partial(fresh, loaded, prompts, max_tokens, temperature)
        alone = decode(loaded, prompts, max_tokens, Mode.PLAIN, temperature)(batch)
        self._tokens, self._seconds = alone.tokens, alone.seconds
        self._makes = {name: partial(make, alone.token_ids) for name, make in drafts.items()}
        self._states = states
        self._plain: list[float] = []  # tokens per second

    def measure(self, least: int, transformers: float | None, say: OnMessage) -> list[Cell]:
        """Return a cell for every draft."""
        runs = max(least, round(_CELL_S / self._seconds))
        return [self._cell(name, runs, transformers, say) for name in self._makes]

    def _cell(self, name: str, runs: int, transformers: float | None, say: OnMessage) -> Cell:
        say(f"Batch {self._batch}, temperature {self._temperature:g}, {name}: {runs} races")
        ours: list[float] = []
        paper: list[float] = []
        for _ in range(runs):
            ours.append(self._against_plain(Mode.OPT_TREE, name))
            if not paper or paper[0] > _NEAR * ours[0]:
                paper.append(self._against_plain(Mode.PAPER, name))
        return Cell(
            self._batch, self._temperature, name, median(self._plain), median(ours), median(paper), transformers, runs
        )

    def _against_plain(self, mode: Mode, name: str) -> float:
        """Return how many times as fast as plain decoding a mode is, in an interleaved run of both."""
        seconds, plain_seconds = run_interleaved([self._engine(mode, name, 0), self._engine(Mode.PLAIN, name, 1)])
        self._plain.append(self._tokens / plain_seconds)
        return plain_seconds / seconds

    def _engine(self, mode: Mode, name: str, lane: int) -> Engine:
        options = replace(self._loaded.options, mode=mode, max_sequences=self._batch)
        state = self._states[name] if mode is Mode.OPT_TREE else SpeculationState()
        target = SlotRange(self._loaded.target, lane * self._batch, self._batch)
        engine = self._loaded.engine(options, self._makes[name], state, target)
        for sequence in self._fresh():
            engine.add(sequence)
        return engine


def _random_draft(loaded: LoadedModel) -> PackedModel:
    """Return a model of the target's kind with a fifteenth of its layers and random weights."""
    config = loaded.target.config
    shape = {**config.to_dict(), "num_hidden_layers": max(config.num_hidden_layers // 15, 1), "layer_types": None}
    small = type(config)(**shape)
    dtype = loaded.target.dtype
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        small, dtype=dtype, attn_implementation=ATTENTION_NAME
    ).eval()
    fuse_layers(model)
    return PackedModel(model, slots=loaded.options.max_sequences, capacity=loaded.options.draft_slot_tokens)


class ReplayDrafter:
    """Offers what a plain run has written, wrong now and then: as good a draft as one could train, and free."""

    name = "replay"
    forward_free = None  # it has no other part

    def __init__(self, known: Texts) -> None:
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

    def num_uncached_tokens(self, sequence: EngineSequence) -> int:
        """It reads nothing."""
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
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
            f"{c.opt_tree:.2f}",
            f"{c.paper:.2f}",
            peer_ratio,
        )
    return shown
