"""Build the body of a submission from the prompts given to `submit`: a list of requests, or the lines of a file."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, Protocol, cast

from jobs.client.parameters import Parameters
from jobs.client.response_format import response_format
from jobs.errors import InvalidValue
from jobs.input_format import filled_lines, reject_other_formats
from jobs.messages import Endpoint
from jobs.openai.paths import endpoint_of_line
from jobs.tables.cells import is_missing, python_value
from jobs.tables.columns import Columns, requests_of
from jobs.tables.formats import BOM, HEAD_BYTES, TABLE_MAGIC, TableFormat, format_of_name
from jobs.tables.frames import columns_of_frame, is_frame, rows_of_frame
from jobs.tables.gunzip import MAGIC, unpack, without_gz
from jobs.tables.locations import is_url, reading
from jobs.tables.readers import Row, peekable, table_of


@dataclass(frozen=True, slots=True)
class PromptFile:
    """Content and suffix of a file. `.txt` is text, a suffix with "json" is JSON lines, else the content decides."""

    content: bytes
    suffix: str = ""
    name: str = "The file"

    def unpacked(self) -> PromptFile:
        """Return a gzip file unpacked, with the suffix that is left; other files as they are."""
        if not self.content.startswith(MAGIC):
            return self
        try:
            content = unpack(self.content, _MAX_UNPACKED_BYTES)
        except InvalidValue as refused:
            raise InvalidValue(f"{self.name}: {refused.message}") from refused
        return replace(self, content=content, suffix=Path(without_gz(self.name)).suffix.lower())


class Frame(Protocol):
    """A data frame of pandas or polars."""

    @property
    def columns(self) -> Any:
        """Column names, in order."""

    @property
    def to_dict(self) -> Any:
        """The method that returns its rows."""


class Dataset(Protocol):
    """A table of pyarrow, or a dataset of Hugging Face."""

    @property
    def column_names(self) -> Any:
        """Column names, in order."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of requests at a path, or at a URL such as s3://bucket/data.parquet."""

    location: str


Prompts = (
    Iterable[str | Mapping[str, Any]]
    | Mapping[str, Any]
    | str
    | bytes
    | PromptFile
    | os.PathLike[str]
    | IO[str]
    | IO[bytes]
    | DataFile
    | Frame
    | Dataset
)

_MAX_UNPACKED_BYTES = 1 << 30  # of a gzip file; services take less
_SPOOL_BYTES = 16 << 20  # of a table's requests in memory; more are kept in a temporary file
_FRAME = "The data frame"
ALL_COLUMNS: Final = Columns()
PARAMETER_NAMES: Final = frozenset(Parameters.__annotations__)
_LINES_INSPECTED = 20
_FILE_NAME = re.compile(r"\S+\.(?:jsonl|ndjson|json|txt|csv|tsv|parquet|gz|xlsx|pdf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SubmissionBody:
    """Requests or lines of a submission, without its parameters."""

    requests: list[Any] | None = None
    lines: IO[bytes] | None = None  # JSON lines, at its start
    endpoint: Endpoint | None = None  # that the lines of an OpenAI batch file name


def build_body(prompts: Prompts, columns: Columns = ALL_COLUMNS) -> SubmissionBody:
    """Return the body for the prompts; raise InvalidValue if they can't be submitted."""
    if isinstance(prompts, str):
        _refuse_file_name(prompts)
        return SubmissionBody(requests=[prompts])
    if isinstance(prompts, Mapping):
        return SubmissionBody(requests=[_request(prompts, 0)])
    if isinstance(prompts, DataFile | os.PathLike):
        return _located_body(prompts.location if isinstance(prompts, DataFile) else os.fspath(prompts), columns)
    if isinstance(prompts, bytes | PromptFile):
        return _file_body(PromptFile(prompts) if isinstance(prompts, bytes) else prompts, columns)
    if callable(getattr(prompts, "read", None)):
        return _file_body(_read(prompts), columns)
    if is_frame(prompts):
        read = columns.reader(columns_of_frame(prompts), PARAMETER_NAMES, _FRAME)
        return SubmissionBody(lines=_spooled(requests_of(rows_of_frame(prompts), read, _FRAME), _FRAME))
    if columns.given:
        read = columns.reader(None, PARAMETER_NAMES, "The list")
        return SubmissionBody(lines=_spooled(requests_of(_rows(prompts), read, "The list"), "The list"))
    return SubmissionBody(requests=[_request(value, index) for index, value in enumerate(_values(prompts))])


def _located_body(location: str, columns: Columns) -> SubmissionBody:
    """Return the body of a path or URL: a table is read row by row, other files as a whole."""
    if not is_url(location) and Path(location).is_dir():
        raise InvalidValue(f"{location} is a directory; give the file in it that holds the prompts.")
    with reading(location) as file:
        buffered = peekable(file)
        if columns.given or _is_table(location, buffered.peek(HEAD_BYTES)):
            return _table_body(buffered, location, columns)
        return _file_body(PromptFile(buffered.read(), Path(location).suffix.lower(), location), columns)


def _is_table(name: str, head: bytes) -> bool:
    """Return whether a file is read as a table, although no columns are named: not JSON lines, and not text."""
    form = format_of_name(name)
    if form is TableFormat.JSON:
        return head.lstrip().startswith(b"[")
    return form not in (None, TableFormat.JSON_LINES) or head.startswith(TABLE_MAGIC)


def _table_body(file: IO[bytes], name: str, columns: Columns) -> SubmissionBody:
    with table_of(file, name) as table:
        read = columns.reader(table.columns, PARAMETER_NAMES, name)
        return SubmissionBody(lines=_spooled(requests_of(table.rows, read, name), name))


def _spooled(lines: Iterable[bytes], name: str) -> IO[bytes]:
    """Return the lines as a file, on the disk if they are many; raise InvalidValue without any."""
    spool = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115
    try:
        spool.writelines(lines)
        if not spool.tell():
            raise InvalidValue(f"{name} has no rows.")
    except BaseException:
        spool.close()
        raise
    return cast(IO[bytes], spool)


def _rows(values: Any) -> Iterator[Row]:
    for index, value in enumerate(_values(values)):
        if not isinstance(value, Mapping):
            raise InvalidValue(f"Prompt {index} has no columns: it is {type(value).__name__}, not an object.")
        yield value


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


def _file_body(file: PromptFile, columns: Columns) -> SubmissionBody:
    """Return the body of a file: JSON lines unchanged, each line of text as one prompt, or the rows of a table."""
    file = file.unpacked()
    name = without_gz(file.name) if format_of_name(file.name) else file.name + file.suffix
    if columns.given or _is_table(name, file.content[:HEAD_BYTES]):
        return _table_body(BytesIO(file.content), name, columns)
    file = replace(file, content=_with_newlines(file.content))
    content = file.content.removeprefix(BOM)
    reject_other_formats(content, file.name, file.suffix)
    if _is_text(content, file.suffix):
        return SubmissionBody(lines=BytesIO(b"".join(_as_json_lines(file))))
    values = map(_json, filled_lines(content))
    return SubmissionBody(
        lines=BytesIO(file.content),
        endpoint=endpoint_of_line(next((value for value in values if value is not None), None)),
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
        text = file.content.removeprefix(BOM).decode()
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


def _values(prompts: Any) -> Iterator[Any]:
    """Return the elements of an iterable."""
    try:
        return iter(prompts)
    except TypeError as exc:
        raise InvalidValue(
            f"A value of type {type(prompts).__name__} holds no prompts; pass a list, a data frame, or a Path."
        ) from exc


def _request(value: Any, index: int) -> Any:
    """Return a prompt as JSON values; raise InvalidValue if it is not a prompt."""
    if not isinstance(value, str | Mapping):
        what = "nothing" if is_missing(value) else f"a value of type {type(value).__name__}"
        raise InvalidValue(f"Prompt {index} is {what}; a prompt is a string, or an object with prompt or messages.")
    request = str(value) if isinstance(value, str) else _with_format(value)
    try:
        written = json.dumps(request, ensure_ascii=False, allow_nan=False, default=python_value).encode()
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
