"""Tables for other programs: rows as CSV that a spreadsheet may open.

Knows rows, not what they are about. Names and texts come from strangers: a cell that a spreadsheet would run as a
formula is marked as text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TextIO

# What begins a formula, directly or behind what a spreadsheet strips first.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def write_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], file: TextIO) -> None:
    """Write the rows with a heading; what is not measured is an empty cell."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(row.get(column)) for column in columns] for row in rows)


def cell(value: Any) -> Any:
    """Return a value as a cell. Numbers are as they are: only text can be a formula."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text
