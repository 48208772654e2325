"""Write the files that commands are asked for."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from jobs.client.results import Output
from jobs.input_format import reject_output_suffix
from jobs.json_lines import json_line

_OUTPUTS = (
    "outputs are written as JSON lines",
    ".jsonl .ndjson .json .txt",
    "In Python, job.dataframe() gives them as a table, with to_csv, to_parquet and to_excel.",
)


def refuse_output_file(path: Path) -> None:
    """Refuse an `--output` file of another format, or one that can't be written, before any other work."""
    reject_output_suffix(path, *_OUTPUTS)
    refuse_unwritable(path, "--output")


def write_outputs(outputs: Iterable[Output], path: Path) -> None:
    """Write outputs as JSON lines. An existing file is replaced only after all are written."""
    count = 0
    is_device = path.exists() and not path.is_file()  # or a pipe: written to directly
    part = path if is_device else path.with_name(path.name + ".part")
    with writing(path, "--output"):
        with part.open("w", encoding="utf-8") as file:
            for output in outputs:
                file.write(json_line(output) + "\n")
                count += 1
        if part != path:
            part.replace(path)
    typer.echo(f"Wrote {count} outputs to {path}", err=True)


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
def writing(path: Path, option: str) -> Iterator[None]:
    """Turn an OSError into an error message for the option that names the file."""
    try:
        yield
    except OSError as exc:
        raise typer.BadParameter(f"{path} can't be written: {exc.strerror}", param_hint=option) from exc
