"""`basic fields`: every field of a request and what the service does with it, from the table of the parser."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Final, get_args

import typer

from jobs.cli.render import make_console, reference_table
from jobs.messages import Endpoint
from jobs.submission.fields import FIELDS, MESSAGE_FIELDS, Field, Treatment

_MARKDOWN_HEAD: Final = """\
# Fields of a request

The fields of OpenAI, vLLM, SGLang and TGI, and what bASIC does with them in single calls, batch lines and `/v1/jobs`.
An honoured field is used. A dropped field is accepted with any value and ignored. A refused field fails its request
with the code `unsupported_parameter` and the reason below, unless its value asks for nothing: null, or one of the
column "asks for nothing". A field of a body that is not listed is refused as unknown, to find misspelt names; so is a
filled key of a batch line other than `custom_id`, `id`, `method`, `url`, `body` and `keep`.

The prompt is `messages` on `/v1/chat/completions`, `prompt` on `/v1/completions`, and `input`, `instructions` and
`previous_response_id` on [`/v1/responses`](responses.md). A request of a job may also have `custom_id` (or `id`),
`model`, `timeout_s`, and `keep`: an object with values of yours, which its output returns. `max_tokens` beyond what the
prompt leaves of the context is reduced to that; the answer then ends with `finish_reason` `length`. `temperature`,
`top_p`, `top_k`, `min_p`, `repetition_penalty` and `max_tokens` that a request does not set come from the model's
generation config ([reasoning.md](reasoning.md#default-sampling)), else they have OpenAI's defaults.

This page is generated: `basic fields --markdown > docs/fields.md`.
"""
_COLUMNS: Final = ("field", "type", "endpoint", "treatment", "asks for nothing", "meaning")
_SECTIONS: Final = {
    Treatment.HONOURED: "Honoured",
    Treatment.REFUSED: "Refused",
    Treatment.DROPPED: "Dropped",
}


def fields(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown: the page docs/fields.md.")] = False,
) -> None:
    """Print every field of a request and what the service does with it.

    Example: basic fields
    """
    if markdown:
        typer.echo(_MARKDOWN_HEAD + "".join(_markdown_lines()), nl=False)
    else:
        rows = ((field.name, field.treatment, _idle(field).replace("`", ""), field.meaning) for field in FIELDS)
        make_console().print(reference_table(("field", "is", "asks for nothing", "meaning"), rows))


def _markdown_lines() -> Iterator[str]:
    for treatment, title in _SECTIONS.items():
        yield from _section(title, (field for field in FIELDS if field.treatment is treatment))
    yield from _section("Fields of a message", MESSAGE_FIELDS)


def _section(title: str, listed: Iterable[Field]) -> Iterator[str]:
    yield f"\n## {title}\n\n| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"
    for field in listed:
        cells = (f"`{field.name}`", field.type, _endpoints(field), field.treatment, _idle(field), field.meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _endpoints(field: Field) -> str:
    if len(field.endpoints) == len(get_args(Endpoint)):
        return "all"
    return ", ".join(endpoint.removeprefix("/v1/").removesuffix("/completions") for endpoint in field.endpoints)


def _idle(field: Field) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in field.idle)
