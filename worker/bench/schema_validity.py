"""Decode one answer for each schema of a file, and check each finished one with the jsonschema library.

    python -m worker.bench.schema_validity schemas.jsonl --temperatures 0,1

A line of the file is an object with `schema`, and maybe `name`. The exit status is 1 if a finished answer is not valid
for its schema, or if an answer is neither finished nor cut at the maximum length.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from jobs.errors import RequestRefused
from jobs.grammar.compiler import check
from jobs.messages import CHAT_ENDPOINT, GenerationRequest, GrammarSpec, SamplingParameters
from worker.loading.loader import LoadedModel, load_engine
from worker.terminal import print_message, readable_errors, settings_of
from worker.text.output_stream import OutputStream

_PROMPT_CHARS: Final = 1_500  # of a schema in its prompt


@dataclass(frozen=True, slots=True)
class SchemaAnswer:
    """What became of one schema: `valid`, `cut`, `refused` by the API server, `failed` in the engine, or `broken`."""

    name: str
    temperature: float
    end: str
    text: str  # of the answer, or why there is none


def answers(
    loaded: LoadedModel, schemas: Sequence[tuple[str, Any]], temperature: float, max_tokens: int, batch: int
) -> Iterator[SchemaAnswer]:
    """Yield an answer for each schema."""
    served: list[tuple[str, Any, GenerationRequest]] = []
    for name, schema in schemas:
        grammar = GrammarSpec(kind="json_schema", value=json.dumps(schema))
        try:
            check(grammar, "schema")
        except RequestRefused as refused:
            yield SchemaAnswer(name, temperature, "refused", str(refused))
            continue
        prompt = f"Write JSON that is valid for this schema:\n{json.dumps(schema)[:_PROMPT_CHARS]}"
        sampling = SamplingParameters(temperature=temperature, max_tokens=max_tokens, seed=len(served))
        served.append(
            (name, schema, GenerationRequest(model=loaded.name, prompt=prompt, sampling=sampling, grammar=grammar))
        )
    for start in range(0, len(served), batch):
        yield from _decoded(loaded, served[start : start + batch], temperature)


def _decoded(
    loaded: LoadedModel, served: Sequence[tuple[str, Any, GenerationRequest]], temperature: float
) -> Iterator[SchemaAnswer]:
    engine = loaded.engine()
    streams: dict[int, OutputStream] = {}
    sequences = []
    for index, (_, _, request) in enumerate(served):
        prompt = loaded.codec.encode(request, CHAT_ENDPOINT)
        form = loaded.codec.answer_format(request, CHAT_ENDPOINT, prompt)
        grammar = loaded.codec.grammar(request, form)
        sequence = loaded.codec.sequence((0, index), prompt, request.sampling, 0, grammar)
        stream = loaded.codec.stream(request.sampling, prompt, CHAT_ENDPOINT, form, grammar)
        streams[sequence.number] = OutputStream(sequence.key, stream)
        sequences.append(sequence)
        engine.add(sequence)
    while engine.busy:
        for result in engine.step():
            streams[result.number].take(result)
    for (name, schema, _), sequence in zip(served, sequences, strict=True):
        stream_ = streams[sequence.number]
        end = "failed" if sequence.failure else _end(stream_.text, stream_.finish_reason, schema)
        yield SchemaAnswer(name, temperature, end, sequence.failure or stream_.text)


def _end(text: str, finish_reason: str | None, schema: Any) -> str:
    import jsonschema  # of the development installation

    if finish_reason == "length":
        return "cut"
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema)
    try:
        return "valid" if finish_reason == "stop" and validator.is_valid(json.loads(text)) else "broken"
    except ValueError:
        return "broken"


def main(
    schemas: Annotated[Path, typer.Argument(exists=True, help="JSONL file of objects with `schema`.")],
    temperatures: Annotated[str, typer.Option(help="Sampling temperatures, as 0,1.")] = "0,1",
    max_tokens: Annotated[int, typer.Option(min=1, help="Max tokens of each answer.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Answers that are decoded together.")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="Max number of schemas.")] = 1_000,
    target: Annotated[str | None, typer.Option(help="Model; default: BASIC_TARGET.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as a JSON line.")] = False,
) -> None:
    """Decode an answer for each schema and check the finished ones.

    Example: python -m worker.bench.schema_validity schemas.jsonl --temperatures 0,1
    """
    lines = [json.loads(line) for line in schemas.read_text("utf-8").splitlines() if line.strip()][:limit]
    some = [(str(line.get("name", n)), line["schema"]) for n, line in enumerate(lines)]
    ends: Counter[tuple[float, str]] = Counter()
    with readable_errors():
        loaded = load_engine(settings_of(target=target, max_sequences=batch), print_message)
        for temperature in map(float, temperatures.split(",")):
            for answer in answers(loaded, some, temperature, max_tokens, batch):
                ends[temperature, answer.end] += 1
                if as_json:
                    print(json.dumps(asdict(answer)), flush=True)
                elif answer.end not in ("valid", "cut"):
                    print(f"{answer.name}: {answer.end}: {answer.text[:300]}", flush=True)
    for (temperature, end), count in sorted(ends.items()):
        print(f"temperature {temperature:g}: {count} {end} of {len(some)}")
    raise typer.Exit(int(any(end in ("broken", "failed") for _, end in ends)))


if __name__ == "__main__":
    typer.run(main)
