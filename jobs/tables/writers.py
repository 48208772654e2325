"""Write rows as JSON lines, CSV or Parquet, to files and URLs. No partial file is left under the final name.

The columns of a table, and the types of a Parquet file, are known only when all rows are: until then they wait in a
temporary file.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import IO, Any, Final

from jobs.json_lines import json_line
from jobs.tables.formats import TableFormat
from jobs.tables.packages import load

_SPOOL_BYTES: Final = 16 << 20  # of rows in memory; more wait on the disk
_ROWS_PER_BATCH: Final = 1_000


def write_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], form: TableFormat, file: IO[bytes]) -> int:
    """Write rows as a table in CSV, TSV or Parquet; return their number.

    `columns` come first, if a row has them or not; other names follow in the order in which they appear.
    """
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
        kinds: dict[str, set[str]] = {name: set() for name in columns}
        count = 0
        for row in rows:
            for name, value in row.items():
                kinds.setdefault(name, set()).add(_kind(value))
            spool.write(json_line(dict(row)).encode() + b"\n")
            count += 1
        spool.seek(0)
        waiting = map(json.loads, spool)
        if form is TableFormat.PARQUET:
            _write_parquet(waiting, {name: _type(found) for name, found in kinds.items()}, file)
        else:
            _write_separated(waiting, list(kinds), "\t" if form is TableFormat.TSV else ",", file)
    return count


def _write_separated(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str], delimiter: str, file: IO[bytes]
) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    text.detach()


def _cell(value: Any) -> Any:
    """Return a value as a cell: JSON for lists, objects and booleans, so that each reads back as it was."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _write_parquet(rows: Iterator[Mapping[str, Any]], types: Mapping[str, str], file: IO[bytes]) -> None:
    pyarrow, parquet = load("pyarrow", "Parquet files"), load("pyarrow.parquet", "Parquet files")
    schema = pyarrow.schema([(name, kind) for name, kind in types.items()])
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while batch := list(islice(rows, _ROWS_PER_BATCH)):
            values = [{name: _as(kind, row.get(name)) for name, kind in types.items()} for row in batch]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(values, schema=schema))


def _kind(value: Any) -> str:
    """Return the type of a value in a Parquet file; empty for a missing one."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    return "double" if isinstance(value, float) else "string"


def _type(kinds: set[str]) -> str:
    """Return the one type that holds values of these types."""
    found = kinds - {""}
    if found == {"int64", "double"}:
        return "double"
    return found.pop() if len(found) == 1 else "string"


def _as(kind: str, value: Any) -> Any:
    """Return a value as its column's type: as JSON in a column of texts."""
    if value is None or kind != "string":
        return value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
