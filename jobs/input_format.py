"""Recognise input files that are not lines of prompts, by suffix, magic bytes and shape, to explain what to do.

Does not check single lines: an invalid line fails alone when the job is submitted.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import PurePath
from typing import Any, Final

from jobs.errors import InvalidValue

_WANTED: Final = "Provide JSON lines (.jsonl), or one prompt per line (.txt)."

_GZIP: Final = "packed (gzip)"
_PACKED: Final = "Unpack it first."
_UNPACK: Final = "Unpack it, or send it with the header content-encoding: gzip."
_UTF_8: Final = "Save it as UTF-8."

# By suffix. `jobs.client.request_body` handles the accepted ones (.txt, .jsonl, .json).
_SUFFIXES: Final = {
    **dict.fromkeys((".csv", ".tsv"), "a table (CSV)"),
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "a spreadsheet"),
    **dict.fromkeys((".parquet", ".feather", ".arrow", ".orc", ".avro"), "a table in a binary format"),
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz"), "packed"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".pdf", ".epub"), "a document with a layout"),
    **dict.fromkeys((".htm", ".html", ".xml"), "HTML or XML"),
    **dict.fromkeys((".md", ".markdown", ".rst", ".tex"), "a document"),
    **dict.fromkeys((".py", ".js", ".ts", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".sh", ".sql"), "source code"),
    **dict.fromkeys((".yaml", ".yml", ".toml"), "YAML or TOML"),
    **dict.fromkeys((".npy", ".npz", ".pkl", ".pickle", ".h5", ".pt", ".safetensors"), "binary data"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "a database"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"), "an image"),
    ".ipynb": "a notebook",
}

# By magic bytes.
_MAGIC: Final = (
    (rb"\x1f\x8b", _GZIP),
    (rb"BZh[1-9]1AY&SY", "packed (bzip2)"),
    (rb"\xfd7zXZ\0", "packed (xz)"),
    (rb"\x28\xb5\x2f\xfd", "packed (zstd)"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "packed"),
    (rb"PK[\x03\x05]", "packed (zip), as are spreadsheets and documents of office programs"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a spreadsheet or document of an office program"),
    (rb"\{\\rtf", "a document with a layout"),
    (rb"%PDF-", "PDF"),
    (rb"PAR1", "a table in a binary format (Parquet)"),
    (rb"ARROW1\0|FEA1|ORC[\x00-\x20]|Obj\x01", "a table in a binary format"),
    (rb"SQLite format 3\0", "a database (SQLite)"),
    (rb"\x89HDF|\x93NUMPY|\x80[\x02-\x05]", "binary data"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a", "an image"),
    (rb"(?i)\s*<(?:!doctype html|html|\?xml)[\s>]", "HTML or XML"),
)

_TO_LINES: Final = "Write one object per line: jq -c '.[]' converts an array to lines, and jq -c . objects."
_WITHOUT_HEADER: Final = (
    "Name it .csv or .tsv, or name its columns (--prompt-column, Columns(prompt=…)), to submit its rows. "
    "If each line is a prompt, name the file .txt."
)
_WITHOUT_COMMAS: Final = "Remove the commas at the ends of the lines."

_CELL: Final = r'"?\w[\w. -]*"?'
_HEADING: Final = re.compile(rf"(?:{_CELL})?(?:(?P<comma>[,;\t|]){_CELL})+")  # prose has a space after a comma
_SAMPLE_ROWS: Final = 20
_SAMPLE_BYTES: Final = 4096
_MIN_SHARE: Final = 0.7  # of rows or bytes that must match
_ARRAY_START: Final = re.compile(rb"\[\s*(?:$|[\[{\"])")


def reject_other_formats(content: bytes, name: str, suffix: str) -> None:
    """Raise InvalidValue, with advice, if a file is recognised as something else than lines of prompts."""
    for what, advice in _other_formats(content, suffix):
        raise InvalidValue(f"{name} is {what}. {advice}")


def reject_output_suffix(path: PurePath, written: str, suffixes: str, advice: str = "") -> None:
    """Raise InvalidValue if the suffix of an output file belongs to another format than `written`, the one we write."""
    what = _SUFFIXES.get(path.suffix.lower())
    if what is not None and path.suffix.lower() not in suffixes.split():
        raise InvalidValue(f"{path} would be {what}, but {written} ({suffixes.split()[0]}). {advice}".rstrip())


def reject_bytes_of_other_formats(content: bytes, name: str) -> None:
    """Raise InvalidValue, with advice, if the bytes are recognised as something else than text in UTF-8."""
    for what, advice in _other_bytes(content, ""):
        raise InvalidValue(f"{name} is {what}. {advice}")


def _other_bytes(content: bytes, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield (format, advice) for each other format that the first bytes show."""
    for pattern, what in _MAGIC:
        if re.match(pattern, content) and not (suffix == ".txt" and what.startswith("HTML")):
            packed = what.startswith("packed (") and "office" not in what
            yield what, _UNPACK if what == _GZIP else _PACKED if packed else _WANTED
    if (encoding := wide_encoding(content)) is not None:
        yield f"text in {encoding}, neither JSON lines nor text in UTF-8", _UTF_8


def _other_formats(content: bytes, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield (format, advice) for each other format that the file matches, best match first."""
    yield from _other_bytes(content, suffix)
    if suffix in _SUFFIXES:
        what = _SUFFIXES[suffix]
        yield what, _WITHOUT_HEADER if "CSV" in what else _PACKED if what == "packed" else _WANTED
    lines = list(islice(filled_lines(content), _SAMPLE_ROWS))
    if not lines:
        yield "empty", _WANTED
    elif suffix == ".txt":
        return
    elif "json" in suffix or lines[0].startswith((b"{", b"[")):
        yield from _other_json(content, lines)
    elif _is_table(lines):
        yield "a table (CSV)", _WITHOUT_HEADER


def _other_json(content: bytes, lines: list[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (format, advice) for JSON that does not have one value per line."""
    first = _value(lines[0])
    if isinstance(first, list) and len(lines) == 1:
        yield "one JSON array", _TO_LINES
    if first is not None:
        return
    if all(line.endswith(b",") for line in lines[:-1]) and isinstance(_value(lines[0].rstrip(b",")), dict | str):
        yield "JSON with a comma after each line", _WITHOUT_COMMAS
    if len(lines) > 1 and _value(lines[1]) is None and (lines[0] == b"{" or _ARRAY_START.match(lines[0])):
        yield "JSON with one value on several lines", _TO_LINES
    if _first_value_has_lines(content):
        yield "JSON with one value on several lines", _TO_LINES


def _is_table(lines: list[bytes]) -> bool:
    """Return whether the lines are a row of column names and rows with the same number of cells."""
    try:
        heading, *texts = (line.decode() for line in lines)
        match = _HEADING.fullmatch(heading)
        if match is None:
            return False
        widths = [len(row) for row in csv.reader([heading, *texts], delimiter=match["comma"])]
    except (UnicodeDecodeError, csv.Error):
        return False
    return len(widths) > 1 and widths.count(widths[0]) > _MIN_SHARE * len(widths)


def filled_lines(content: bytes) -> Iterator[bytes]:
    """Yield the non-blank lines, stripped."""
    start = 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        if line := content[start:end].strip(b" \t\r\n\x1a\0"):
            yield line
        start = end + 1


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _first_value_has_lines(content: bytes) -> bool:
    """Return whether the first JSON value of the file spans several lines."""
    try:
        text = content.decode(errors="replace").lstrip()
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def wide_encoding(content: bytes) -> str | None:
    """Return UTF-16 or UTF-32 if the text has this encoding, else None."""
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    sample = content[:_SAMPLE_BYTES]
    halves = (sample[0::2], sample[1::2])
    mostly_nul = any(len(half) > 1 and half.count(0) > _MIN_SHARE * len(half) for half in halves)
    return "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) or mostly_nul else None
