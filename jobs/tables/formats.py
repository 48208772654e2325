"""The formats of tables, recognised by suffix and checked by the first bytes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Final

from jobs.errors import InvalidValue


class TableFormat(StrEnum):
    """The format of a file with a table."""

    CSV = "CSV"
    TSV = "TSV"
    JSON_LINES = "JSON lines"
    JSON = "a JSON array"
    PARQUET = "Parquet"
    ARROW = "Arrow"


_SUFFIXES: Final = {
    ".csv": TableFormat.CSV,
    ".tsv": TableFormat.TSV,
    ".tab": TableFormat.TSV,
    ".jsonl": TableFormat.JSON_LINES,
    ".ndjson": TableFormat.JSON_LINES,
    ".json": TableFormat.JSON,
    ".parquet": TableFormat.PARQUET,
    ".pq": TableFormat.PARQUET,
    ".arrow": TableFormat.ARROW,
    ".feather": TableFormat.ARROW,
    ".ipc": TableFormat.ARROW,
}
_PARQUET: Final = b"PAR1"
ARROW_FILE: Final = b"ARROW1"
_ARROW_STREAM: Final = b"\xff\xff\xff\xff"
BOM: Final = b"\xef\xbb\xbf"

TABLE_MAGIC: Final = (_PARQUET, ARROW_FILE)
HEAD_BYTES: Final = 4096  # of a file, from which its format is checked


def format_of_name(name: str) -> TableFormat | None:
    """Return the format that a file's name announces, without a final .gz; None for another suffix."""
    return _SUFFIXES.get(suffix_of(name))


def suffix_of(name: str) -> str:
    """Return the suffix of a path or URL in lower case, without a final .gz and a query."""
    path = PurePosixPath(name.partition("?")[0].lower() if "://" in name else name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix == ".gz" else path.suffix


def check_format(name: str, head: bytes, named: TableFormat | None) -> TableFormat | None:
    """Return the format of a file, from its name and its first bytes; None if neither shows a table.

    Raise InvalidValue if the bytes are of another format than the name says.
    """
    found = _format_of_bytes(head, named)
    if found is None or named in (None, found) or {named, found} == {TableFormat.JSON, TableFormat.JSON_LINES}:
        return found or named
    raise InvalidValue(f"{name} is named as {named} and holds {found}. Rename it to its own suffix.")


def _format_of_bytes(head: bytes, named: TableFormat | None) -> TableFormat | None:
    if head.startswith(_PARQUET):
        return TableFormat.PARQUET
    if head.startswith(ARROW_FILE) or (head.startswith(_ARROW_STREAM) and named is TableFormat.ARROW):
        return TableFormat.ARROW
    text = head.removeprefix(BOM).lstrip()
    if named in (TableFormat.PARQUET, TableFormat.ARROW):
        return TableFormat.JSON_LINES if text.startswith(b"{") else TableFormat.CSV
    if named in (TableFormat.JSON, TableFormat.JSON_LINES):
        return TableFormat.JSON if text.startswith(b"[") else TableFormat.JSON_LINES
    return None
