"""Build the body of a submission from the prompts given to `submit`: a list of requests, or the lines of a file.

Data frames are recognized by their methods, so that the client does not need pandas.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

from jobs.client.gunzip import MAGIC, unpack, without_gz
from jobs.client.response_format import response_format
from jobs.errors import InvalidValue
from jobs.input_format import filled_lines, reject_other_formats
from jobs.messages import Endpoint
from jobs.openai.paths import endpoint_of_line


@dataclass(frozen=True, slots=True)
class PromptFile:
    """Content and suffix of a file. `.txt` is text, a suffix with "json" is JSON lines, else the content decides."""

    content: bytes
    suffix: str = ""
    name: str = "The file"

    @classmethod
    def read(cls, path: Path) -> PromptFile:
        """Read a file; raise InvalidValue for a directory, OSError if it can't be read."""
        if path.is_dir():
            raise InvalidValue(f"{path} is a directory; give the file in it that holds the prompts.")
        return cls(path.read_bytes(), path.suffix.lower(), str(path))

    def unpacked(self) -> PromptFile:
        """Return a gzip file unpacked, with the suffix that is left; other files as they are."""
        if not self.content.startswith(MAGIC):
            return self
        try:
            content = unpack(self.content, _MAX_UNPACKED_BYTES)
        except InvalidValue as refused:
            raise InvalidValue(f"{self.name}: {refused.message}") from refused
        return replace(self, content=content, suffix=Path(without_gz(self.name)).suffix.lower())


class Table(Protocol):
    """A data frame of pandas or polars."""

    @property
    def columns(self) -> Any:
        """Column names, in order."""

    @property
    def to_dict(self) -> Any:
        """The method that returns its rows."""


Prompts = (
    Iterable[str | Mapping[str, Any]]
    | Mapping[str, Any]
    | str
    | bytes
    | PromptFile
    | os.PathLike[str]
    | IO[str]
    | IO[bytes]
    | Table
)

_MAX_UNPACKED_BYTES = 1 << 30  # of a gzip file; services take less
_BOM = b"\xef\xbb\xbf"
_IDS = ("custom_id", "id")
_LINES_INSPECTED = 20
_REQUEST_COLUMNS = ("prompt", "messages", "body")  # a request has one of them
_FILE_NAME = re.compile(r"\S+\.(?:jsonl|ndjson|json|txt|csv|tsv|parquet|gz|xlsx|pdf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SubmissionBody:
    """Requests or lines of a submission, without its parameters."""

    requests: list[Any] | None = None
    lines: bytes | None = None
    endpoint: Endpoint | None = None  # that the lines of an OpenAI batch file name


def build_body(prompts: Prompts) -> SubmissionBody:
    """Return the body for the prompts; raise InvalidValue if they can't be submitted."""
    if isinstance(prompts, str):
        _refuse_file_name(prompts)
        return SubmissionBody(requests=[prompts])
    if isinstance(prompts, Mapping):
        return SubmissionBody(requests=[_request(prompts, 0)])
    if isinstance(prompts, os.PathLike):
        return _file_body(PromptFile.read(Path(prompts)))
    if isinstance(prompts, bytes | PromptFile):
        return _file_body(PromptFile(prompts) if isinstance(prompts, bytes) else prompts)
    if callable(getattr(prompts, "read", None)):
        return _file_body(_read(prompts))
    return SubmissionBody(requests=[_request(value, index) for index, value in enumerate(_values(prompts))])


def _refuse_file_name(prompt: str) -> None:
    """Refuse a prompt that is the name of an existing file: the caller meant its content."""
    if _FILE_NAME.fullmatch(prompt) and Path(prompt).is_file():
        raise InvalidValue(
            f"{prompt!r} is the name of a file; submit Path({prompt!r}) for its content, or [{prompt!r}] for this text."
        )


def _read(file: Any) -> PromptFile:
    """Return content, suffix and name of an open file, in text or binary mode."""
    content = file.read()
    name = str(getattr(file, "name", "The file"))
    return PromptFile(content.encode() if isinstance(content, str) else content, Path(name).suffix.lower(), name)


def _file_body(file: PromptFile) -> SubmissionBody:
    """Return the body of a file: JSON lines unchanged, each line of text as one prompt."""
    file = file.unpacked()
    file = replace(file, content=_with_newlines(file.content))
    content = file.content.removeprefix(_BOM)
    reject_other_formats(content, file.name, file.suffix)
    if _is_text(content, file.suffix):
        return SubmissionBody(lines=b"".join(_as_json_lines(file)))
    values = map(_json, filled_lines(content))
    return SubmissionBody(
        lines=file.content, endpoint=endpoint_of_line(next((value for value in values if value is not None), None))
    )


def _is_text(content: bytes, suffix: str) -> bool:
    """Return whether the lines are plain text. A file of JSON lines whose first line is broken is not text."""
    if suffix == ".txt" or "json" in suffix:
        return suffix == ".txt"
    head = list(islice(filled_lines(content), _LINES_INSPECTED))
    if head[0].startswith(b'{"') or isinstance(_json(head[0]), str | dict):
        return False
    return not (head[0].startswith(b"{") and any(isinstance(_json(line), dict) for line in head))


def _with_newlines(content: bytes) -> bytes:
    """Return the content with newlines: some programs end lines with a carriage return, and files with Ctrl-Z."""
    content = content.rstrip(b"\x1a")
    return content if b"\n" in content else content.replace(b"\r", b"\n")


def _as_json_lines(file: PromptFile) -> Iterator[bytes]:
    try:
        text = file.content.removeprefix(_BOM).decode()
    except UnicodeDecodeError as exc:
        raise InvalidValue(
            f"{file.name} is neither JSON lines nor text in UTF-8: byte {exc.start} can't be read. Save it as UTF-8."
        ) from exc
    prompts = (line.strip() for line in text.split("\n"))
    return (json.dumps(prompt, ensure_ascii=False).encode() + b"\n" for prompt in prompts if prompt)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _values(prompts: Any) -> Iterable[Any]:
    """Return the elements of an iterable, or the rows of a data frame."""
    if hasattr(prompts, "columns"):
        return _rows(prompts)
    try:
        values: Iterator[Any] = iter(prompts)
    except TypeError as exc:
        raise InvalidValue(
            f"A value of type {type(prompts).__name__} holds no prompts; pass a list, a data frame, or a Path."
        ) from exc
    return values


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    """Return the rows of a data frame without their missing cells."""
    names = [str(name) for name in getattr(table, "column_names", table.columns)]
    if not set(_REQUEST_COLUMNS) & set(names):
        raise InvalidValue(
            f"The data frame has no column prompt or messages, but {', '.join(names) or 'none'}; rename one, "
            "or submit one column: frame['question']."
        )
    methods = {"to_dicts": (), "to_pylist": (), "to_dict": ("records",)}  # of polars, pyarrow, pandas
    method = next(name for name in methods if callable(getattr(table, name, None)))
    rows = getattr(table, method)(*methods[method])
    return ({name: _cell(name, value) for name, value in row.items() if not _is_missing(value)} for row in rows)


def _cell(name: str, value: Any) -> Any:
    """Return a cell as a JSON value. Ids become text. pandas stores integers as floats if a cell is missing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if name in _IDS else value


def _request(value: Any, index: int) -> Any:
    """Return a prompt as JSON values; raise InvalidValue if it is not a prompt."""
    if not isinstance(value, str | Mapping):
        what = "nothing" if _is_missing(value) else f"a value of type {type(value).__name__}"
        raise InvalidValue(f"Prompt {index} is {what}; a prompt is a string, or an object with prompt or messages.")
    request = str(value) if isinstance(value, str) else _with_format(value)
    try:
        written = json.dumps(request, ensure_ascii=False, allow_nan=False, default=_python_value).encode()
    except UnicodeEncodeError as exc:
        raise InvalidValue(f"Prompt {index} contains an unpaired surrogate, which is not valid Unicode.") from exc
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidValue(f"Prompt {index} can't be written as JSON: {exc}.") from exc
    return json.loads(written)


def _with_format(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request, or a line of a batch file, whose `response_format` may be a class."""
    found = dict(request)
    if found.get("response_format") is not None:
        found["response_format"] = response_format(found["response_format"])
    if isinstance(found.get("body"), Mapping):
        found["body"] = _with_format(found["body"])
    return found


def _python_value(value: Any) -> Any:
    """Return a numpy scalar or array as Python values, which JSON can encode; raise TypeError for other values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a value of type {type(value).__name__}")


def _is_missing(value: Any) -> bool:
    """Return whether a cell is missing: None, NaN, or the NA value of pandas."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value
