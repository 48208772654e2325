"""Write the files that commands are asked for."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO

import typer

from jobs.client.results import OUTPUT_COLUMNS, Output, output_rows
from jobs.input_format import reject_output_suffix
from jobs.json_lines import json_line
from jobs.tables.formats import TableFormat, format_of_name
from jobs.tables.locations import is_url
from jobs.tables.locations import writing as write_location
from jobs.tables.writers import write_table

_LINES = (".jsonl", ".ndjson", ".json", ".txt")
_TABLES = {TableFormat.CSV, TableFormat.TSV, TableFormat.PARQUET}
_WRITTEN = "outputs are written as JSON lines"
_TABLE_SUFFIXES = "A table is .csv, .tsv or .parquet."


def refuse_output_file(location: str) -> None:
    """Refuse an `--output` file of another format, or one that can't be written, before any other work."""
    if location.endswith(".gz") or _table_format(location) is None:
        reject_output_suffix(PurePath(location), _WRITTEN, " ".join(_LINES), _TABLE_SUFFIXES)
    if not is_url(location):
        refuse_unwritable(Path(location), "--output")


def _table_format(location: str) -> TableFormat | None:
    """Return the format of a table that the suffix names; None: JSON lines."""
    form = format_of_name(location)
    return form if form in _TABLES else None


def write_outputs(outputs: Iterable[Output], location: str) -> None:
    """Write outputs to a file or URL, in the format that its suffix names, which is replaced when all are written."""
    form = _table_format(location)
    with writing(location, "--output"), write_location(location) as file:
        if form is not None:
            rows = (row for output in outputs for row in output_rows(output))
            count = write_table(rows, OUTPUT_COLUMNS, form, file)
        else:
            count = 0
            for output in outputs:
                file.write(_line(output))
                count += 1
    typer.echo(f"Wrote {count} {'outputs' if form is None else 'rows'} to {location}", err=True)


def append_outputs(follow: Callable[[str], Iterable[Output]], location: str) -> None:
    """Write outputs as they come. A file of JSON lines grows line by line, and continues where an earlier call stopped.

    `follow` yields the outputs after a cursor. A table is complete, and appears, when all outputs are there.
    """
    path = Path(location)
    if is_url(location) or _table_format(location) is not None or (path.exists() and not path.is_file()):
        write_outputs(follow(""), location)
        return
    count = 0
    with writing(location, "--output"), path.open("a+b") as file:
        cursor = _last_cursor(file, path)
        for output in follow(cursor):
            file.write(_line(output))
            file.flush()
            count += 1
    typer.echo(
        f"Appended {count} outputs to {location}" if cursor else f"Wrote {count} outputs to {location}", err=True
    )


def _last_cursor(file: IO[bytes], path: Path) -> str:
    """Return the cursor of the last whole line, and cut the file after it; empty for an empty file."""
    file.seek(0)
    last, end = b"", 0
    for line in file:
        if line.endswith(b"\n"):
            last, end = line, end + len(line)
    file.truncate(end)
    if not last:
        return ""
    try:
        return str(json.loads(last)["cursor"])
    except (ValueError, KeyError, TypeError) as exc:
        raise typer.BadParameter(
            f"{path} holds other lines than followed outputs; name a new file", param_hint="--output"
        ) from exc


def _line(output: Output) -> bytes:
    return json_line(output).encode() + b"\n"


def refuse_unwritable(path: Path, option: str) -> None:
    """Refuse a file that can't be written, before any other work."""
    folder = path.parent
    if path.is_dir():
        reason = "it is a folder"
    elif not folder.is_dir():
        reason = f"there is no folder {folder}; create it first"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = os.strerror(errno.EACCES)
    else:
        return
    raise typer.BadParameter(f"{path} can't be written: {reason}", param_hint=option)


@contextmanager
def writing(path: Path | str, option: str) -> Iterator[None]:
    """Turn an OSError into an error message for the option that names the file."""
    try:
        yield
    except OSError as exc:
        raise typer.BadParameter(f"{path} can't be written: {exc.strerror}", param_hint=option) from exc
