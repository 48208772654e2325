"""Measure answers that a JSON schema binds: tokens per step with and without forced tokens, and what masks cost.

    python -m worker.bench.structured_output --batch 1,8 --whitespace ""
    python -m worker.bench.structured_output --masks-at 32

The first decodes the same answers plainly, with drafts, with forced tokens and with both, in turns; the texts are the
same each time. The second decodes a full batch plainly with and without grammars, in turns, and reads the
processor time of the threads that compute masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jobs.errors import RequestRefused
from jobs.grammar.compiler import grammar_text
from jobs.messages import GrammarSpec
from worker.benchmark import parse_batches
from worker.engine.engine import Engine
from worker.engine.grammar.grammar import Grammar
from worker.engine.grammar.vocabulary import GrammarVocabulary, num_threads
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.state import SpeculationState
from worker.loading.loader import LoadedModel, load_engine
from worker.terminal import print_message, readable_errors, settings_of

_STRING = {"type": "string", "maxLength": 60}
_TASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "Extract the person: Ada Lovelace, born 1815 in London, wrote the first published program.",
        {"first_name": _STRING, "last_name": _STRING, "birth_year": {"type": "integer"}, "birth_place": _STRING},
    ),
    (
        "Extract the order: two bags of coffee at 8.50 EUR each and one grinder at 45.00 EUR for Jean Martin, Lyon.",
        {
            "customer_name": _STRING,
            "delivery_city": _STRING,
            "currency": {"enum": ["EUR", "USD", "GBP"]},
            "order_lines": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": {"article": _STRING, "quantity": {"type": "integer"}, "unit_price": {"type": "number"}},
            },
        },
    ),
    (
        "Classify the review: The battery lasts two days, but the screen scratches easily.",
        {
            "sentiment": {"enum": ["positive", "negative", "mixed", "neutral"]},
            "advantages": {"type": "array", "items": _STRING, "minItems": 1, "maxItems": 3},
            "disadvantages": {"type": "array", "items": _STRING, "minItems": 1, "maxItems": 3},
            "would_recommend": {"type": "boolean"},
        },
    ),
    (
        "Plan the event: a workshop on bread baking next Saturday at 10 o'clock in the community kitchen, 12 seats.",
        {
            "event_title": _STRING,
            "location": _STRING,
            "start_time": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
            "max_participants": {"type": "integer"},
            "registration_required": {"type": "boolean"},
        },
    ),
    (
        "Call the weather tool for Nairobi, tomorrow, in degrees Celsius.",
        {
            "tool": {"const": "get_weather_forecast"},
            "arguments": {
                "city": _STRING,
                "day": {"enum": ["today", "tomorrow"]},
                "unit": {"enum": ["celsius", "kelvin"]},
            },
        },
    ),
    (
        "Name the three largest planets of the solar system with their radius in kilometres.",
        {
            "planets": {
                "type": "array",
                "minItems": 3,
                "maxItems": 3,
                "items": {"planet_name": _STRING, "mean_radius_km": {"type": "integer"}},
            }
        },
    ),
    (
        "Write a ticket: users can't log in since the update of this morning; the server answers with status 500.",
        {
            "ticket_title": _STRING,
            "severity": {"enum": ["low", "medium", "high", "critical"]},
            "affected_component": _STRING,
            "steps_to_reproduce": {"type": "array", "items": _STRING, "minItems": 2, "maxItems": 2},
        },
    ),
    (
        "Describe a recipe for tomato soup for four people.",
        {
            "recipe_name": _STRING,
            "servings": {"type": "integer"},
            "preparation_minutes": {"type": "integer"},
            "ingredients": {"type": "array", "items": _STRING, "minItems": 3, "maxItems": 5},
        },
    ),
)  # instruction, and the properties of the answer; a dict without `type`, `enum` and `const` stands for an object
_MASK_STEPS = 24  # of a run that measures masks: the answers are longer, so the batch stays full


@dataclass(frozen=True, slots=True)
class SchemaTask:
    """A prompt and the grammar of its answer."""

    prompt: list[int]
    grammar: Grammar


@dataclass(frozen=True, slots=True)
class SchemaRun:
    """All answers, decoded in one way."""

    batch: int
    way: str
    tokens: int
    steps: int  # of one sequence each, without prefill
    wall_s: float
    cpu_s: float
    tokens_per_step: float
    speed_ratio: float  # tokens per second over plain decoding
    cpu_ratio: float  # the same by processor time, which other programs change less


@dataclass(frozen=True, slots=True)
class MaskCost:
    """A full batch decoded plainly, with grammars and without."""

    sequences: int
    tokens: int
    wall_ratio: float  # of a step with grammars to one without
    cpu_ratio: float  # of the process
    mask_cpu_share: float  # of the processor time of a step, by the threads that compute masks
    mask_us: float  # processor time of one mask


def schema_of(properties: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of an object with all these properties and no other."""
    return {
        "type": "object",
        "properties": {name: _full(value) for name, value in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }


def _full(value: dict[str, Any]) -> dict[str, Any]:
    if "items" in value:
        return value | {"items": _full(value["items"])}
    return value if value.keys() & {"type", "enum", "const"} else schema_of(value)


def tasks_of(loaded: LoadedModel, schemas: Path | None, limit: int, whitespace: str | None) -> list[SchemaTask]:
    """Return the tasks: the built-in ones, or one for each schema of a JSONL file that the service holds.

    The parts of JSON have white space between them that matches `whitespace`; None: the service's default.
    """
    some = [(text, schema_of(properties)) for text, properties in _TASKS]
    if schemas is not None:
        lines = [json.loads(line)["schema"] for line in schemas.read_text("utf-8").splitlines() if line.strip()]
        some = [("Give an example of a JSON document that this schema describes.", schema) for schema in lines]
    found = []
    for text, schema in some:
        try:
            grammar = grammar_text(GrammarSpec(kind="json_schema", value=json.dumps(schema), whitespace=whitespace))
        except RequestRefused:
            continue
        messages = [{"role": "user", "content": f"{text}\nAnswer in JSON of this schema:\n{json.dumps(schema)}"}]
        prompt = loaded.codec.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = loaded.codec.tokenizer.backend_tokenizer.encode(str(prompt), add_special_tokens=False).ids
        found.append(SchemaTask(list(ids), Grammar(grammar)))
    return found[:limit]


def _sequences(
    loaded: LoadedModel, tasks: Sequence[SchemaTask], max_tokens: int, temperature: float, *, bound: bool = True
) -> list[EngineSequence]:
    """Return a sequence for each task. Without its grammar it has no end, so that it runs as long as the longest."""
    return [
        EngineSequence(
            key=i,
            ids=list(task.prompt),
            num_prompt=len(task.prompt),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, key=noise_key(i, 0)),
            eos_ids=loaded.codec.eos_ids if bound else frozenset(),
            grammar=task.grammar if bound else None,
        )
        for i, task in enumerate(tasks)
    ]


def measure(
    loaded: LoadedModel, tasks: Sequence[SchemaTask], batch: int, max_tokens: int, temperature: float, rounds: int
) -> list[SchemaRun]:
    """Decode the tasks in four ways, in turns; raises RuntimeError if texts differ."""
    plain = replace(loaded.options, mode=Mode.PLAIN, max_sequences=batch)
    trees = replace(loaded.options, mode=Mode.OPT_TREE, max_sequences=batch)
    ways: dict[str, tuple[EngineOptions, Callable[[], Drafter]]] = {
        "plain": (plain, loaded.make_drafter),
        "drafts": (replace(trees, forced_tokens=False), loaded.make_drafter),
        "forced tokens": (trees, NoDrafts),
        "drafts and forced tokens": (trees, loaded.make_drafter),
    }
    states = {way: loaded.initial_state() for way in ways}
    totals = {way: _Totals() for way in ways}
    texts = []
    for turn in range(rounds + 1):
        for way, (options, make_drafter) in ways.items():
            some = _sequences(loaded, tasks, max_tokens, temperature)
            engine = loaded.engine(options, make_drafter, states[way])
            totals[way].add(engine, some, counted=turn > 0)  # the first turn warms up
            texts.append([s.output_ids for s in some])
    if any(text != texts[0] for text in texts):
        raise RuntimeError("the texts depend on drafts or forced tokens; report this as a bug")
    return [total.run(batch, way, totals["plain"]) for way, total in totals.items()]


class NoDrafts:
    """A drafter that offers nothing."""

    name = "none"

    @property
    def forward_free(self) -> Drafter:
        """All of it."""
        return self

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer nothing."""
        return Candidates(np.zeros((len(frontier), 1), np.int64), np.zeros((len(frontier), 1)))

    def num_uncached_tokens(self, sequence: EngineSequence) -> int:
        """Return 0: it reads nothing."""
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Learn nothing."""

    def drop(self, sequence: EngineSequence) -> None:
        """Forget nothing."""


class _Totals:
    """Sums over the turns of one way of decoding."""

    def __init__(self) -> None:
        self.tokens = self.steps = 0
        self.wall_s = self.cpu_s = 0.0

    def add(self, engine: Engine, some: Sequence[EngineSequence], *, counted: bool = True) -> None:
        """Decode sequences to their end."""
        for sequence in some:
            engine.add(sequence)
        while engine.busy:
            wall, cpu = perf_counter(), process_time()
            results = engine.step()
            decoding = int((results.steps > 0).sum())
            if counted and decoding:
                self.wall_s += perf_counter() - wall
                self.cpu_s += process_time() - cpu
                self.steps += decoding
                self.tokens += int(results.counts[results.steps > 0].sum())

    def run(self, batch: int, way: str, plain: _Totals) -> SchemaRun:
        """Return the sums and their ratio to plain decoding."""
        return SchemaRun(
            batch=batch,
            way=way,
            tokens=self.tokens,
            steps=self.steps,
            wall_s=self.wall_s,
            cpu_s=self.cpu_s,
            tokens_per_step=self.tokens / self.steps,
            speed_ratio=(self.tokens / self.wall_s) / (plain.tokens / plain.wall_s),
            cpu_ratio=(self.tokens / self.cpu_s) / (plain.tokens / plain.cpu_s),
        )


def measure_masks(loaded: LoadedModel, tasks: Sequence[SchemaTask], sequences: int, rounds: int) -> MaskCost:
    """Decode a full batch plainly, with and without grammars, one step of each in turns, while all are decoding."""
    some = [tasks[index % len(tasks)] for index in range(sequences)]
    options = replace(loaded.options, mode=Mode.PLAIN, max_sequences=sequences)
    totals = {bound: _Totals() for bound in (False, True)}
    mask_s = 0.0
    masks = 0
    for _ in range(rounds):
        for bound, total in totals.items():
            before = _thread_s(loaded.grammars)
            engine = loaded.engine(options, None, SpeculationState())
            first = total.tokens
            total.add(engine, _sequences(loaded, some, _MASK_STEPS, 1.0, bound=bound))
            if bound:
                mask_s += _thread_s(loaded.grammars) - before
                masks += total.tokens - first
    free, held = totals[False], totals[True]
    return MaskCost(
        sequences=sequences,
        tokens=held.tokens,
        wall_ratio=(held.wall_s / held.tokens) / (free.wall_s / free.tokens),
        cpu_ratio=(held.cpu_s / held.tokens) / (free.cpu_s / free.tokens),
        mask_cpu_share=mask_s / held.cpu_s,
        mask_us=mask_s / masks * 1e6,
    )


def _thread_s(vocabulary: GrammarVocabulary) -> float:
    """Return the processor time of the threads that compute masks."""
    clock: Callable[[], float] = thread_time
    return sum(vocabulary.start(index, clock).result() for index in range(num_threads()))


def main(
    target: Annotated[str | None, typer.Option(help="Model; default: BASIC_TARGET.")] = None,
    schemas: Annotated[Path | None, typer.Option(help="JSONL file of objects with `schema`; default: 8 tasks.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Max number of tasks.")] = 16,
    batch: Annotated[str, typer.Option(help="Batch sizes, as 1,8.")] = "1,8",
    max_tokens: Annotated[int, typer.Option(min=2, help="Max tokens of each answer.")] = 160,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature.")] = 0.0,
    whitespace: Annotated[str | None, typer.Option(help="White space between parts of JSON, as an expression.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that are measured.")] = 2,
    masks_at: Annotated[int, typer.Option(help="Measure masks alone, at this batch size.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Decode answers that a JSON schema binds: plainly, with drafts, and with forced tokens beside them.

    Example: python -m worker.bench.structured_output --batch 1,8
    """
    with readable_errors():
        sizes = parse_batches(batch)
        loaded = load_engine(settings_of(target=target, max_sequences=max(*sizes, masks_at)), print_message)
        tasks = tasks_of(loaded, schemas, limit, whitespace)
        rows: list[SchemaRun | MaskCost] = []
        if masks_at:
            rows.append(measure_masks(loaded, tasks, masks_at, rounds))
        else:
            for size in sizes:
                rows += measure(loaded, tasks, size, max_tokens, temperature, rounds)
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    table = Table(*asdict(rows[0]), title=f"{loaded.name} on {loaded.device}, {len(tasks)} tasks")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in asdict(row).values()))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
