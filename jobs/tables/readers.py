"""Read the rows of a table one after the other, in memory that does not grow with the table."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import IO, Any, Final, cast

from jobs.errors import InvalidValue
from jobs.tables.formats import ARROW_FILE, BOM, HEAD_BYTES, TableFormat, check_format, format_of_name
from jobs.tables.gunzip import MAGIC
from jobs.tables.locations import reading
from jobs.tables.packages import load

Row = Mapping[str, Any]

_ROWS_PER_BATCH: Final = 1_000  # of a file by columns: each batch becomes Python values at once
_MAX_CELL_CHARS: Final = 10_000_000  # as long as a line that services take
_DELIMITERS: Final = ",;\t|"


class Table:
    """The rows of a file: their column names, if the format has them, and an iterator."""

    def __init__(self, name: str, form: TableFormat, columns: Sequence[str] | None, rows: Iterator[Row]) -> None:
        self.name = name
        self.format = form
        self.columns = columns  # None: each row names its own
        self.rows = rows


@contextmanager
def open_table(location: str) -> Iterator[Table]:
    """Open a file or URL; raise InvalidValue if it can't be read, or is no table."""
    with reading(location) as file, table_of(file, location) as table:
        yield table


@contextmanager
def table_of(file: IO[bytes], name: str) -> Iterator[Table]:
    """Read an open file, which may be packed with gzip, as a table."""
    buffered = peekable(file)
    head = buffered.peek(HEAD_BYTES)[:HEAD_BYTES]
    if head.startswith(MAGIC):
        with gzip.open(buffered) as unpacked, table_of(cast(IO[bytes], _checked(unpacked, name)), name) as table:
            yield table
        return
    if not head.strip():
        raise InvalidValue(f"{name} is empty.")
    form = check_format(name, head, format_of_name(name)) or _format_of_text(head)
    yield _READERS[form](buffered, name)


def peekable(file: IO[bytes]) -> Any:
    """Return a file with `peek`, which files of other libraries lack."""
    return file if hasattr(file, "peek") else io.BufferedReader(_Raw(file), 1 << 20)


def _format_of_text(head: bytes) -> TableFormat:
    """Return the format of a table whose name says nothing."""
    start = head.removeprefix(BOM).lstrip()[:1]
    return {b"{": TableFormat.JSON_LINES, b"[": TableFormat.JSON}.get(start, TableFormat.CSV)


class _Raw(io.RawIOBase):
    """A readable file of another library, such as fsspec, for `io.BufferedReader`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _checked(unpacked: gzip.GzipFile, name: str) -> gzip.GzipFile:
    try:
        unpacked.peek(1)
    except (OSError, EOFError) as exc:
        raise InvalidValue(f"{name}: the gzip data is damaged ({exc}). Pack the file again.") from exc
    return unpacked


def _csv(file: IO[bytes], name: str) -> Table:
    return _separated(file, name, TableFormat.CSV, None)


def _tsv(file: IO[bytes], name: str) -> Table:
    return _separated(file, name, TableFormat.TSV, "\t")


def _separated(file: IO[bytes], name: str, form: TableFormat, delimiter: str | None) -> Table:
    """Read a table with a header; without a delimiter, the header's own: the one that occurs most often in it."""
    csv.field_size_limit(_MAX_CELL_CHARS)
    lines = _decoded(file, name)
    first = next(lines, "")
    chosen = delimiter or max(_DELIMITERS, key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=chosen, strict=True)
    with _explained_text(name, reader):
        header = next(reader, [])
    columns = [column.strip() for column in header]
    if repeated := sorted({column for column in columns if columns.count(column) > 1}):
        raise InvalidValue(f"{name} has the column {repeated[0]!r} twice.")
    return Table(name, form, columns, _cells(reader, columns, name))


def _decoded(file: IO[bytes], name: str) -> Iterator[str]:
    """Yield the lines of a text, with their ends."""
    for number, line in enumerate(file, 1):
        try:
            yield (line.removeprefix(BOM) if number == 1 else line).decode()
        except UnicodeDecodeError as exc:
            raise InvalidValue(f"{name}, line {number}: not text in UTF-8. Save the file as UTF-8.") from exc


def _cells(reader: Any, columns: list[str], name: str) -> Iterator[Row]:
    """Yield rows without their empty cells."""
    while True:
        with _explained_text(name, reader):
            cells = next(reader, None)
        if cells is None:
            return
        if cells and len(cells) != len(columns):
            raise InvalidValue(
                f"{name}, line {reader.line_num}: {len(cells)} cells, but the header has {len(columns)}. A cell with "
                "the delimiter or a line break needs quotes around it."
            )
        if cells:
            yield {column: cell for column, cell in zip(columns, cells, strict=True) if cell != ""}


def _json_lines(file: IO[bytes], name: str) -> Table:
    return Table(name, TableFormat.JSON_LINES, None, _objects(_lines(file, name)))


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    """Yield where each value is, and the value."""
    for number, line in enumerate(file, 1):
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            where = f"{name}, line {number}"
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as exc:
                raise InvalidValue(f"{where}: the line is not JSON ({exc}).") from exc


def _json_array(file: IO[bytes], name: str) -> Table:
    ijson = load("ijson", "JSON arrays")

    def values() -> Iterator[tuple[str, Any]]:
        found = enumerate(ijson.items(file, "item", use_float=True))
        while True:
            try:
                index, value = next(found)
            except StopIteration:
                return
            except ijson.JSONError as exc:
                raise InvalidValue(f"{name} is not a JSON array: {exc}") from exc
            yield f"{name}, element {index}", value

    return Table(name, TableFormat.JSON, None, _objects(values()))


def _objects(values: Iterator[tuple[str, Any]]) -> Iterator[Row]:
    for where, value in values:
        if isinstance(value, str):
            yield {"prompt": value}
        elif isinstance(value, dict):
            yield value
        else:
            raise InvalidValue(f"{where} is neither an object nor a text.")


def _parquet(file: IO[bytes], name: str) -> Table:
    parquet = load("pyarrow.parquet", "Parquet files")
    with _explained_arrow(name):
        table = parquet.ParquetFile(file)
    batches = table.iter_batches(batch_size=_ROWS_PER_BATCH)
    return Table(name, TableFormat.PARQUET, list(table.schema_arrow.names), rows_of_batches(batches, name))


def _arrow(file: IO[bytes], name: str) -> Table:
    ipc = load("pyarrow.ipc", "Arrow files")
    is_file = file.peek(len(ARROW_FILE)).startswith(ARROW_FILE)  # type: ignore[attr-defined]  # it is peekable
    with _explained_arrow(name):
        if is_file:
            opened = ipc.open_file(file)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        else:
            opened = ipc.open_stream(file)
            batches = iter(opened)
    return Table(name, TableFormat.ARROW, list(opened.schema.names), rows_of_batches(batches, name))


def rows_of_batches(batches: Iterator[Any], name: str) -> Iterator[Row]:
    """Yield the rows of record batches of pyarrow, a bounded number of them as Python values at a time."""
    while True:
        with _explained_arrow(name):
            batch = next(batches, None)
        if batch is None:
            return
        for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
            yield from batch.slice(start, _ROWS_PER_BATCH).to_pylist()


@contextmanager
def _explained_text(name: str, reader: Any) -> Iterator[None]:
    try:
        yield
    except (csv.Error, EOFError, OSError) as exc:
        raise InvalidValue(f"{name}, line {reader.line_num}: {exc}.") from exc


@contextmanager
def _explained_arrow(name: str) -> Iterator[None]:
    pyarrow = load("pyarrow", "Arrow and Parquet files")
    try:
        yield
    except (pyarrow.ArrowException, OSError) as exc:
        raise InvalidValue(f"{name} can't be read: {exc}") from exc


_READERS: Final = {
    TableFormat.CSV: _csv,
    TableFormat.TSV: _tsv,
    TableFormat.JSON_LINES: _json_lines,
    TableFormat.JSON: _json_array,
    TableFormat.PARQUET: _parquet,
    TableFormat.ARROW: _arrow,
}
