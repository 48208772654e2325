"""What someone hands to `submit`, as a body: a list of requests, or lines of a file. Knows no HTTP.

Data frames are known by what they can do, so that nobody needs pandas who has none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, get_args

from jobs.errors import InvalidValue
from jobs.input_format import filled_lines, reject_other_formats
from jobs.messages import Endpoint


@dataclass(frozen=True, slots=True)
class Lines:
    """What a file holds, and the suffix of its name: .txt, or anything with json. Else its first line says which."""

    content: bytes
    suffix: str = ""
    name: str = "The file"

    @classmethod
    def read(cls, path: Path) -> Lines:
        """Return what a file holds; raise InvalidValue for a directory, OSError for what can't be read."""
        if path.is_dir():
            raise InvalidValue(f"{path} is a directory; give the file in it that holds the prompts.")
        return cls(path.read_bytes(), path.suffix.lower(), str(path))


class Table(Protocol):
    """A data frame, as pandas and polars have it."""

    @property
    def columns(self) -> Any:
        """The names of its columns."""

    @property
    def to_dict(self) -> Any:
        """What returns its rows."""


Prompts = (
    Iterable[str | Mapping[str, Any]]
    | Mapping[str, Any]
    | str
    | bytes
    | Lines
    | os.PathLike[str]
    | IO[str]
    | IO[bytes]
    | Table
)

_BOM = b"\xef\xbb\xbf"
_IDS = ("custom_id", "id")
_LINES_LOOKED_AT = 20
_TEXTS = ("prompt", "messages", "body")  # a request has one of them
_FILE_NAME = re.compile(r"\S+\.(?:jsonl|ndjson|json|txt|csv|tsv|parquet|gz|xlsx|pdf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Body:
    """A submission without its parameters: requests or lines."""

    requests: list[Any] | None = None
    lines: bytes | None = None
    endpoint: Endpoint | None = None  # that lines of an OpenAI batch file name


def body_of(prompts: Prompts) -> Body:
    """Return the body of whatever holds prompts."""
    if isinstance(prompts, str):
        _refuse_file_name(prompts)
        return Body(requests=[prompts])
    if isinstance(prompts, Mapping):
        return Body(requests=[_request(prompts, 0)])
    if isinstance(prompts, os.PathLike):
        return _lines_body(Lines.read(Path(prompts)))
    if isinstance(prompts, bytes | Lines):
        return _lines_body(Lines(prompts) if isinstance(prompts, bytes) else prompts)
    if callable(getattr(prompts, "read", None)):
        return _lines_body(_read(prompts))
    return Body(requests=[_request(value, index) for index, value in enumerate(_values(prompts))])


def _refuse_file_name(prompt: str) -> None:
    """Refuse a prompt that is the name of a file here: its text was meant."""
    if _FILE_NAME.fullmatch(prompt) and Path(prompt).is_file():
        raise InvalidValue(f"{prompt!r} is the name of a file; submit it as Path({prompt!r}), a text as [{prompt!r}].")


def _read(file: Any) -> Lines:
    """Return what an open file holds."""
    content = file.read()
    name = str(getattr(file, "name", "The file"))
    return Lines(content.encode() if isinstance(content, str) else content, Path(name).suffix.lower(), name)


def _lines_body(lines: Lines) -> Body:
    """Return the body of a file: JSON lines as they are, lines of text as one prompt each."""
    lines = replace(lines, content=_with_newlines(lines.content))
    content = lines.content.removeprefix(_BOM)
    reject_other_formats(content, lines.name, lines.suffix)
    if _is_text(content, lines.suffix):
        return Body(lines=b"".join(_as_json_lines(lines)))
    values = map(_json, filled_lines(content))
    return Body(lines=lines.content, endpoint=_endpoint(next((value for value in values if value is not None), None)))


def _is_text(content: bytes, suffix: str) -> bool:
    """Return whether lines are prompts as they stand. JSON lines whose first is broken are no text."""
    if suffix == ".txt" or "json" in suffix:
        return suffix == ".txt"
    head = list(islice(filled_lines(content), _LINES_LOOKED_AT))
    if head[0].startswith(b'{"') or isinstance(_json(head[0]), str | dict):
        return False
    return not (head[0].startswith(b"{") and any(isinstance(_json(line), dict) for line in head))


def _with_newlines(content: bytes) -> bytes:
    """Return lines that end as lines do: some programs end them with a carriage return, and files with Ctrl-Z."""
    content = content.rstrip(b"\x1a")
    return content if b"\n" in content else content.replace(b"\r", b"\n")


def _as_json_lines(lines: Lines) -> Iterator[bytes]:
    try:
        text = lines.content.removeprefix(_BOM).decode()
    except UnicodeDecodeError as exc:
        raise InvalidValue(
            f"{lines.name} is neither JSON lines nor text in UTF-8: byte {exc.start} can't be read. Save it as UTF-8."
        ) from exc
    prompts = (line.strip() for line in text.split("\n"))
    return (json.dumps(prompt, ensure_ascii=False).encode() + b"\n" for prompt in prompts if prompt)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _endpoint(first: Any) -> Endpoint | None:
    url = first.get("url") if isinstance(first, dict) and "body" in first else None
    return next((endpoint for endpoint in get_args(Endpoint) if endpoint == url), None)


def _values(prompts: Any) -> Iterable[Any]:
    """Return the prompts of an iterable, or the rows of a data frame."""
    if hasattr(prompts, "columns"):
        return _rows(prompts)
    try:
        values: Iterator[Any] = iter(prompts)
    except TypeError as exc:
        raise InvalidValue(
            f"A value of type {type(prompts).__name__} holds no prompts; give a list, a data frame, or a Path."
        ) from exc
    return values


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    """Return the rows of a data frame, each without the cells that hold nothing."""
    names = [str(name) for name in getattr(table, "column_names", table.columns)]
    if not set(_TEXTS) & set(names):
        raise InvalidValue(
            f"The data frame has no column prompt or messages, but {', '.join(names) or 'none'}; rename one, "
            "or submit one column: frame['question']."
        )
    ways = {"to_dicts": (), "to_pylist": (), "to_dict": ("records",)}  # of polars, of pyarrow, of pandas
    way = next(way for way in ways if callable(getattr(table, way, None)))
    rows = getattr(table, way)(*ways[way])
    return ({name: _cell(name, value) for name, value in row.items() if not _missing(value)} for row in rows)


def _cell(name: str, value: Any) -> Any:
    """Return a cell as JSON has it. Ids are text; whole numbers become floats in a column with an empty cell."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if name in _IDS else value


def _request(value: Any, index: int) -> Any:
    """Return a prompt as it goes over the wire; raise InvalidValue for what is none."""
    if not isinstance(value, str | Mapping):
        what = "nothing" if _missing(value) else f"a value of type {type(value).__name__}"
        raise InvalidValue(f"Prompt {index} is {what}; a prompt is a string, or an object with prompt or messages.")
    request = str(value) if isinstance(value, str) else dict(value)
    try:
        written = json.dumps(request, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except UnicodeEncodeError as exc:
        raise InvalidValue(f"Prompt {index} holds half of a surrogate pair, which is no text.") from exc
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidValue(f"Prompt {index} can't be written as JSON: {exc}.") from exc
    return json.loads(written)


def _plain(value: Any) -> Any:
    """Return a value of numpy as one of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a value of type {type(value).__name__}")


def _missing(value: Any) -> bool:
    """Return whether a cell holds nothing: None, or what is not equal to itself, as NaN."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value
