"""What someone hands to `submit`, as a body: a list of requests, or lines of a file. Knows no HTTP.

Data frames are known by what they can do, so that nobody needs pandas who has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jobs.errors import InvalidValue
from jobs.messages import Endpoint


@dataclass(frozen=True, slots=True)
class Lines:
    """What a file holds, and the suffix of its name: .txt, or anything with json. Else its first line says which."""

    content: bytes
    suffix: str = ""


Prompts = Iterable[str | Mapping[str, Any]] | str | bytes | Lines | os.PathLike[str]

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Body:
    """A submission without its parameters: requests or lines."""

    requests: list[Any] | None = None
    lines: bytes | None = None
    endpoint: Endpoint | None = None  # that lines of an OpenAI batch file name


def body_of(prompts: Prompts) -> Body:
    """Return the body of whatever holds prompts."""
    if isinstance(prompts, str):
        return Body(requests=[prompts])
    if isinstance(prompts, os.PathLike):
        path = Path(prompts)
        return _lines_body(Lines(path.read_bytes(), path.suffix.lower()))
    if isinstance(prompts, bytes | Lines):
        return _lines_body(Lines(prompts) if isinstance(prompts, bytes) else prompts)
    return Body(requests=[_request(value, index) for index, value in enumerate(_values(prompts))])


def _lines_body(lines: Lines) -> Body:
    """Return the body of a file: JSON lines as they are, lines of text as one prompt each."""
    first = next((line for line in lines.content.removeprefix(_BOM).split(b"\n") if line.strip()), b"")
    value = _json(first)
    is_text = lines.suffix == ".txt" or ("json" not in lines.suffix and not isinstance(value, str | dict))
    if is_text:
        return Body(lines=b"".join(_as_json_lines(lines.content)))
    return Body(lines=lines.content, endpoint=_endpoint(value))


def _as_json_lines(content: bytes) -> Iterator[bytes]:
    try:
        text = content.removeprefix(_BOM).decode()
    except UnicodeDecodeError as exc:
        raise InvalidValue(
            f"The file is neither JSON lines nor text in UTF-8: byte {exc.start} can't be read."
        ) from exc
    prompts = (line.strip() for line in text.split("\n"))
    return (json.dumps(prompt, ensure_ascii=False).encode() + b"\n" for prompt in prompts if prompt)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _endpoint(first: Any) -> Endpoint | None:
    url = first.get("url") if isinstance(first, dict) and "body" in first else None
    return next((endpoint for endpoint in get_args(Endpoint) if endpoint == url), None)


def _values(prompts: Any) -> Any:
    """Return the prompts of an iterable; of a data frame its rows, each without the cells that hold nothing."""
    if hasattr(prompts, "columns") and hasattr(prompts, "to_dict"):
        return ({name: cell for name, cell in row.items() if not _missing(cell)} for row in prompts.to_dict("records"))
    return prompts


def _request(value: Any, index: int) -> Any:
    if isinstance(value, str | Mapping):
        return str(value) if isinstance(value, str) else dict(value)
    what = "nothing" if _missing(value) else f"a value of type {type(value).__name__}"
    raise InvalidValue(f"Prompt {index} is {what}; a prompt is a string, or an object with prompt or messages.")


def _missing(value: Any) -> bool:
    """Return whether a cell holds nothing: None, or what is not equal to itself, as NaN."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value
