"""Benchmark plain, opt-tree and paper mode at every batch size, draft and temperature: find where plain is faster.

`basic bench --grid` prints it. Four drafts cover the range: `shipped` comes with the target; `suffix` needs no draft
model; `random` has random weights, so it is always wrong and costs its forwards; `replay` knows the text, is right
four times in five and costs nothing. Each mode is interleaved with plain decoding, because the speed of a machine
changes over time; the median is reported, and short cells are run more often. Paper mode is run once where it is far
slower. As in a worker process, the learned state of a draft is kept through the whole grid.
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
from worker.benchmark import Result, decode, encode, load_peer, new_sequences, peer
from worker.drafters.model import ModelDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.engine import Engine
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.sampling.parameters import noise_key
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
MakeDraft = Callable[[Texts], Drafter]  # argument: the token ids of plain decoding
_REPLAY_ACCURACY = 0.8  # share of correct tokens of the replay drafter
_MIN_PROMPTS = 8
_MIN_CELL_S = 6.0  # min plain decoding time of a cell; short cells are run more often
_PAPER_RERUN_RATIO = 0.9  # speed of paper mode relative to opt-tree above which it is run every time
_MAX_PEER_RUNS = 3  # transformers takes longest


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid."""

    batch: int
    temperature: float
    drafter: str
    plain: float  # tokens per second, median
    opt_tree: float  # speed-up over plain, median
    paper: float  # speed-up over plain, median
    transformers: float | None  # tokens per second of its greedy generate; None for temperature > 0
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
    settings: WorkerSettings,
    prompts: Sequence[str],
    batches: Sequence[int],
    max_tokens: int,
    runs: int,
    on_message: OnMessage,
) -> list[Cell]:
    """Measure every cell in at least `runs` interleaved runs."""
    loaded = load_engine(settings.model_copy(update={"max_sequences": 2 * max(batches)}), on_message)  # for two engines
    texts = encode(loaded, prompts, max_tokens)
    drafts = _drafts(loaded)
    states = {name: loaded.initial_state(partial(make, ())) for name, make in drafts.items()}
    transformers = load_peer(resolve(settings.target, settings.cache_dir), loaded)
    cells: list[Cell] = []
    for batch in batches:
        some = [texts[i % len(texts)] for i in range(max(batch, _MIN_PROMPTS))]
        for temperature in TEMPERATURES:
            on_message(f"Batch {batch}, temperature {temperature:g}")
            peers = peer(transformers, loaded, some, max_tokens, temperature) if temperature == 0.0 else None
            peer_rate = median(peers(batch).rate for _ in range(min(runs, _MAX_PEER_RUNS))) if peers else None
            point = _GridPoint(loaded, some, max_tokens, temperature, batch, drafts, states)
            cells += point.measure(runs, peer_rate, on_message)
    return cells


def _drafts(loaded: LoadedModel) -> dict[str, MakeDraft]:
    """Return a function per draft of the grid, by name, that makes its drafter."""
    random, vocab = _random_draft(loaded), len(loaded.codec.tokenizer)
    drafts: dict[str, MakeDraft] = {
        "replay": ReplayDrafter,
        "random": lambda _: ModelDrafter(random, "random", vocab),
        "suffix": lambda _: SuffixDrafter(),
    }
    return {SHIPPED: lambda _: loaded.make_drafter(), **drafts} if loaded.draft else drafts


class _GridPoint:
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
        self._new_sequences = partial(new_sequences, loaded, prompts, max_tokens, temperature)
        plain_run = decode(loaded, prompts, max_tokens, Mode.PLAIN, temperature)(batch)
        self._tokens, self._seconds = plain_run.tokens, plain_run.seconds
        self._drafters = {name: partial(make, plain_run.token_ids) for name, make in drafts.items()}
        self._states = states
        self._plain: list[float] = []  # tokens per second

    def measure(self, min_runs: int, transformers: float | None, on_message: OnMessage) -> list[Cell]:
        """Measure every draft at this point in interleaved runs with plain decoding; return a cell for each."""
        runs = max(min_runs, round(_MIN_CELL_S / self._seconds))
        return [self._cell(name, runs, transformers, on_message) for name in self._drafters]

    def _cell(self, name: str, runs: int, transformers: float | None, on_message: OnMessage) -> Cell:
        on_message(f"Batch {self._batch}, temperature {self._temperature:g}, {name}: {runs} interleaved runs")
        opt_tree: list[float] = []
        paper: list[float] = []
        for _ in range(runs):
            opt_tree.append(self._against_plain(Mode.OPT_TREE, name))
            if not paper or paper[0] > _PAPER_RERUN_RATIO * opt_tree[0]:
                paper.append(self._against_plain(Mode.PAPER, name))
        return Cell(
            self._batch,
            self._temperature,
            name,
            median(self._plain),
            median(opt_tree),
            median(paper),
            transformers,
            runs,
        )

    def _against_plain(self, mode: Mode, name: str) -> float:
        """Return the speed-up of a mode over plain decoding in one interleaved run of both."""
        seconds, plain_seconds = run_interleaved([self._engine(mode, name, 0), self._engine(Mode.PLAIN, name, 1)])
        self._plain.append(self._tokens / plain_seconds)
        return plain_seconds / seconds

    def _engine(self, mode: Mode, name: str, index: int) -> Engine:
        options = replace(self._loaded.options, mode=mode, max_sequences=self._batch)
        state = self._states[name] if mode is Mode.OPT_TREE else SpeculationState()
        target = SlotRange(self._loaded.target, index * self._batch, self._batch)
        engine = self._loaded.engine(options, self._drafters[name], state, target)
        for sequence in self._new_sequences():
            engine.add(sequence)
        return engine


def _random_draft(loaded: LoadedModel) -> PackedModel:
    """Return a model with the target's architecture, 1/15 of its layers, and random weights."""
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
    """Draft the tokens of an earlier plain run, with `_REPLAY_ACCURACY`: a near-ideal draft without cost."""

    name = "replay"
    forward_free = None  # the whole drafter is free

    def __init__(self, known: Texts) -> None:
        """Store the known output of each sequence, by its key."""
        self._known = known

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer one token below each node."""
        tokens = np.zeros((len(frontier), 1), np.int64)
        for row, node in enumerate(frontier.tolist()):
            sequence = forest.sequences[forest.tree[node]]
            assert isinstance(sequence.key, int)
            known = (
                self._known[sequence.key] if sequence.key < len(self._known) else ()
            )  # calibration sequences are unknown
            position = len(sequence.ids) - sequence.num_prompt + int(forest.depth[node])
            correct = noise_key(sequence.key, position) % 100 < 100 * _REPLAY_ACCURACY  # independent for each position
            tokens[row] = known[position] if position < len(known) and correct else 0
        return Candidates(tokens, np.full(tokens.shape, _REPLAY_ACCURACY))

    def num_uncached_tokens(self, sequence: EngineSequence) -> int:
        """Return 0: it reads no tokens."""
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Do nothing: it has no state."""

    def drop(self, sequence: EngineSequence) -> None:
        """Do nothing: it has no state."""


def table(assembly_line: str, cells: Sequence[Cell]) -> Table:
    """Return the grid as a table, with speed-ups."""
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
