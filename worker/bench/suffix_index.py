"""Measure the suffix index on known texts of a job, beside arctic-inference's suffix tree if that is installed.

    python -m worker.bench.suffix_index --prompts prompts.jsonl --choices 4 --temperature 0.8

The target writes the texts once; then each index drafts for them again, in a batch as a worker decodes it. The known
text tells which draft tokens hold. Trees have the same number of nodes everywhere, and any depth. Times are CPU time.

arctic-inference (Snowflake, Apache-2.0) needs torch and a compiler to install. Its Python package is used as vLLM does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import thread_time
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from worker.benchmark import decode, encode, read_prompts
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import IntArray
from worker.engine.sequence import FinishReason
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter, grow
from worker.engine.speculation.tree_budget import FixedBudget
from worker.loading.loader import load_engine
from worker.settings import WorkerSettings
from worker.terminal import print_message
from worker.training.self_generated import Text, read

_FRONTIER = 64  # nodes of the lookup that is timed alone
_ARCTIC = {
    # vLLM's defaults: a chain, of at most as many tokens as matched, each likelier than 0.1.
    "arctic-inference, chain": {"max_spec_factor": 1.0, "min_token_prob": 0.1, "use_tree_spec": False},
    "arctic-inference, tree": {"max_spec_factor": 1.0, "min_token_prob": 0.1, "use_tree_spec": True},
    # Every tree has all its nodes.
    "arctic-inference, full tree": {
        "max_spec_factor": 1.0,
        "max_spec_offset": 100.0,
        "min_token_prob": 0.001,
        "use_tree_spec": True,
    },
}
_MATCHED = 24  # tokens that it matches at most, as in vLLM

Children = dict[tuple[int, int], int]  # (node, token) -> child; the root is -1


class TreeSource(Protocol):
    """What drafts trees for a batch of known texts."""

    @property
    def spent_s(self) -> float:
        """CPU time of the index."""

    def trees(self, sequences: Sequence[EngineSequence], nodes: int) -> list[Children]:
        """Return a tree of at most `nodes` nodes for each sequence; its newest token is the root."""

    def accept(self, sequence: EngineSequence, emitted: list[int]) -> None:
        """Learn what follows in a text."""

    def read(self, sequence: EngineSequence) -> None:
        """Read a finished text at once."""

    def lookup(self, sequences: Sequence[EngineSequence]) -> None:
        """Look up the children of the roots alone."""


class OwnTrees:
    """bASIC's suffix drafter, with trees as OPT-Tree grows them."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self._forest = _Timed(drafter), Forest([])

    @property
    def spent_s(self) -> float:
        """CPU time of the drafter: reading and lookups, without the growth of the trees."""
        return self._drafter.spent_s

    def trees(self, sequences: Sequence[EngineSequence], nodes: int) -> list[Children]:
        """Grow trees of the most likely nodes."""
        forest, budget = Forest(sequences), FixedBudget(nodes, 0.0)
        grow(forest, self._drafter, budget, nodes, forest.roots)
        kept = forest.pruned(budget.cut(forest))
        trees: list[Children] = [{} for _ in sequences]
        columns = (column[kept.trees :].tolist() for column in (kept.tree, kept.parent, kept.token))
        for node, (tree, parent, token) in enumerate(zip(*columns, strict=True), kept.trees):
            trees[tree][(parent if parent >= kept.trees else -1, token)] = node
        return trees

    def accept(self, sequence: EngineSequence, emitted: list[int]) -> None:
        """Drop a finished sequence; tokens are read when the next ones are asked for."""
        if sequence.finished:
            self._drafter.drop(sequence)

    def read(self, sequence: EngineSequence) -> None:
        """Read a finished text at once."""
        self._drafter.drop(sequence)

    def lookup(self, sequences: Sequence[EngineSequence]) -> None:
        """Look up the children of the roots alone; the texts are read at the first call."""
        if list(self._forest.sequences) != list(sequences):
            self._forest = Forest(sequences)
        self._drafter.expand(self._forest, self._forest.roots)


class _Timed:
    """A drafter whose CPU time is summed."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self.name, self.spent_s = drafter, drafter.name, 0.0
        self.num_uncached_tokens, self.commit = drafter.num_uncached_tokens, drafter.commit

    @property
    def forward_free(self) -> Drafter:
        return self

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        started = thread_time()
        offered = self._drafter.expand(forest, frontier)
        self.spent_s += thread_time() - started
        return offered

    def drop(self, sequence: EngineSequence) -> None:
        started = thread_time()
        self._drafter.drop(sequence)
        self.spent_s += thread_time() - started


class ArcticTrees:
    """arctic-inference's cache of suffix trees: one for all outputs of the job, and one for each running text."""

    def __init__(self, cache: Any, options: dict[str, Any]) -> None:
        self._cache, self._options, self.spent_s = cache, options, 0.0

    def trees(self, sequences: Sequence[EngineSequence], nodes: int) -> list[Children]:
        """Ask for the tree of each sequence."""
        trees = []
        for sequence in sequences:
            drafted = self._speculate(sequence, nodes)
            keys = zip(drafted.parents, drafted.token_ids, strict=True)
            trees.append({key: node for node, key in enumerate(keys)})
        return trees

    def _speculate(self, sequence: EngineSequence, nodes: int) -> Any:
        context = np.array(sequence.ids[-_MATCHED:], np.int32)
        self._start(sequence)
        started = thread_time()
        drafted = self._cache.speculate(sequence.number, context, nodes, **self._options)
        self.spent_s += thread_time() - started
        return drafted

    def _start(self, sequence: EngineSequence) -> None:
        if sequence.number in self._cache.active_requests:
            return
        prompt, output = np.split(np.array(sequence.ids, np.int32), [sequence.num_prompt])
        started = thread_time()
        self._cache.start_request(sequence.number, prompt)
        self._cache.add_active_response(sequence.number, output)
        self.spent_s += thread_time() - started

    def accept(self, sequence: EngineSequence, emitted: list[int]) -> None:
        """Add the emitted tokens to both trees; at the end the one of the running text goes."""
        tokens = np.array(emitted, np.int32)
        started = thread_time()
        self._cache.add_active_response(sequence.number, tokens)
        if sequence.finished:
            self._cache.stop_request(sequence.number)
        self.spent_s += thread_time() - started

    def read(self, sequence: EngineSequence) -> None:
        """Read a finished text at once."""
        self._start(sequence)
        started = thread_time()
        self._cache.stop_request(sequence.number)
        self.spent_s += thread_time() - started

    def lookup(self, sequences: Sequence[EngineSequence]) -> None:
        """Ask for one token of each."""
        for sequence in sequences:
            self._speculate(sequence, 1)


@dataclass(frozen=True, slots=True)
class IndexResult:
    """What an index brought on known texts."""

    index: str
    tokens_per_step: float
    drafted_per_step: float  # nodes of a tree
    hit_rate: float  # accepted of drafted tokens
    tree_us: float  # CPU time for each sequence and step: reading what was written and all lookups of the tree
    token_us: float  # for each token of texts that are read at once
    lookup_us: float  # for the children of 64 roots


@dataclass(frozen=True, slots=True)
class _Running:
    """A sequence that repeats a known text, as a step with drafts would emit it."""

    sequence: EngineSequence
    ids: list[int]

    def step(self, tree: Children) -> list[int]:
        """Add the tokens of one step, the accepted ones of the tree and the next one; return them."""
        written, node, end = len(self.sequence.ids), -1, len(self.sequence.ids)
        while end < len(self.ids) - 1 and (node, self.ids[end]) in tree:
            node = tree[(node, self.ids[end])]
            end += 1
        self.sequence.ids += self.ids[written : end + 1]
        if len(self.sequence.ids) == len(self.ids):
            self.sequence.finish_reason = FinishReason.LENGTH
        return self.ids[written : end + 1]


def measure(
    name: str, source: TreeSource, fresh: TreeSource, texts: Sequence[Text], nodes: int, batch: int
) -> IndexResult:
    """Write the texts again in a batch, with drafts of `source`; `fresh` reads them at once."""
    steps = tokens = drafted = 0
    waiting = _written(texts, 1)
    running = list(islice(waiting, batch))
    while running:
        trees = source.trees([one.sequence for one in running], nodes)
        for one, tree in zip(running, trees, strict=True):
            emitted = one.step(tree)
            source.accept(one.sequence, emitted)
            steps, tokens, drafted = steps + 1, tokens + len(emitted), drafted + len(tree)
        running = [one for one in running if not one.sequence.finished]
        running += islice(waiting, batch - len(running))
    return IndexResult(
        index=name,
        tokens_per_step=round(tokens / steps, 3),
        drafted_per_step=round(drafted / steps, 2),
        hit_rate=round((tokens - steps) / max(drafted, 1), 3),
        tree_us=round(source.spent_s / steps * 1e6, 2),
        token_us=round(_token_us(fresh, texts), 3),
        lookup_us=round(_lookup_us(fresh, texts), 1),
    )


def _written(texts: Sequence[Text], tokens: int | None = None) -> Iterator[_Running]:
    """Return the texts with their first `tokens` output tokens written; None: all."""
    for text in texts:
        end = len(text.ids) if tokens is None else text.num_prompt + tokens
        if text.written > 1:
            ids = list(text.ids)
            sequence = EngineSequence(0, ids[:end], text.num_prompt, text.written, Sampling(), group="job")
            yield _Running(sequence, ids)


def _token_us(fresh: TreeSource, texts: Sequence[Text]) -> float:
    before = fresh.spent_s
    for one in _written(texts):
        one.sequence.finish_reason = FinishReason.LENGTH
        fresh.read(one.sequence)
    return (fresh.spent_s - before) / sum(len(text.ids) for text in texts) * 1e6


def _lookup_us(fresh: TreeSource, texts: Sequence[Text]) -> float:
    """Return the CPU time of looking up 64 roots: the median of some, when all is read."""
    sequences = [one.sequence for one in _written(texts, 1)]
    sequences = [sequences[place % len(sequences)] for place in range(_FRONTIER)]
    fresh.lookup(sequences)
    times = []
    for _ in range(15):
        before = fresh.spent_s
        fresh.lookup(sequences)
        times.append(fresh.spent_s - before)
    return float(np.median(times)) * 1e6


def arctic_cache() -> Any:
    """Return a new cache of arctic-inference; None if it is not installed."""
    try:
        from arctic_inference.suffix_decoding import SuffixDecodingCache
    except ImportError:
        return None
    return SuffixDecodingCache(_MATCHED)


def compare(texts: Sequence[Text], nodes: int, batch: int) -> list[IndexResult]:
    """Measure the index and, if it is installed, arctic-inference's."""
    own, fresh = OwnTrees(SuffixDrafter()), OwnTrees(SuffixDrafter())
    results = [measure("bASIC", own, fresh, texts, nodes, batch)]
    for name, options in _ARCTIC.items() if arctic_cache() is not None else ():
        trees, fresh_trees = (ArcticTrees(arctic_cache(), options) for _ in range(2))
        results.append(measure(name, trees, fresh_trees, texts, nodes, batch))
    return results


def write(prompts: Sequence[str], choices: int, temperature: float, max_tokens: int, file: Path | None) -> list[Text]:
    """Let the target write `choices` answers to each prompt, plainly; keep them in a file."""
    loaded = load_engine(WorkerSettings(mode="plain"), print_message)
    asked = [ids for ids in encode(loaded, prompts, max_tokens) for _ in range(choices)]
    answers = decode(loaded, asked, max_tokens, Mode.PLAIN, temperature)(_FRONTIER).token_ids
    pairs = zip(asked, answers, strict=True)
    texts = [Text((*prompt, *answer), len(prompt), temperature == 0.0) for prompt, answer in pairs]
    if file is not None:
        file.write_text("".join(json.dumps(asdict(text)) + "\n" for text in texts))
    return texts


def main(
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL file of objects with `prompt`; default: the examples.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Max number of prompts.")] = 40,
    template: Annotated[Path | None, typer.Option(help="Text file that precedes every prompt.")] = None,
    choices: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the answers.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=2, help="Max tokens of each answer.")] = 128,
    texts: Annotated[
        Path | None, typer.Option(help="File for the texts; one that exists is read, and nothing is written.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes per tree.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Print tokens per step, hit rate and CPU time of the suffix index.

    Example: python -m worker.bench.suffix_index --prompts prompts.jsonl --choices 4 --temperature 0.8
    """
    if texts is not None and texts.exists():
        known = read(texts)
    else:
        before = template.read_text() if template else ""
        asked = [before + prompt for prompt in read_prompts(prompts, limit)]
        known = write(asked, choices, temperature, max_tokens, texts)
    results = compare(known, nodes, batch)
    if as_json:
        for result in results:
            print(json.dumps(asdict(result)))
        return
    table = Table(
        title=f"{len(known)} texts, {sum(text.written for text in known)} tokens, {nodes} nodes, batch {batch}"
    )
    for column in (
        "index",
        "tokens/step",
        "drafted",
        "hit rate",
        "us/tree",
        "us/token read",
        f"us/{_FRONTIER} lookups",
    ):
        table.add_column(column, justify="left" if column == "index" else "right")
    for result in results:
        table.add_row(*map(str, asdict(result).values()))
    Console().print(table)
    if len(results) == 1:
        print_message("arctic-inference is not installed: it was not measured.")


if __name__ == "__main__":
    typer.run(main)
