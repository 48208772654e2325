"""Read the rows of data frames: pandas, polars, pyarrow tables, datasets of Hugging Face.

They are recognised by their methods, so that none of these packages is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from jobs.errors import InvalidValue
from jobs.tables.readers import Row, rows_of_batches

_ROWS_PER_SLICE: Final = 1_000


def is_frame(value: Any) -> bool:
    """Return whether a value is a frame: it has named columns and can yield its rows. Raise InvalidValue for a plan."""
    if hasattr(type(value), "collect_schema") and not hasattr(type(value), "iter_slices"):
        raise InvalidValue("A lazy frame has no rows yet; pass frame.collect().")
    return not isinstance(value, type) and any(hasattr(value, name) for name in ("column_names", "columns"))


def columns_of_frame(frame: Any) -> list[str] | None:
    """Return the column names of a frame; None if only its rows have them."""
    names = getattr(frame, "column_names", None)
    names = getattr(frame, "columns", None) if names is None else names
    return None if names is None else [str(name) for name in names]


def rows_of_frame(frame: Any) -> Iterator[Row]:
    """Yield the rows of a frame, some at a time as Python values."""
    if hasattr(frame, "to_batches"):  # pyarrow
        return rows_of_batches(iter(frame.to_batches()), "The table")
    if hasattr(frame, "iter_slices"):  # polars
        return (row for part in frame.iter_slices(_ROWS_PER_SLICE) for row in part.to_dicts())
    if hasattr(frame, "iloc"):  # pandas
        starts = range(0, len(frame), _ROWS_PER_SLICE)
        return (row for at in starts for row in frame.iloc[at : at + _ROWS_PER_SLICE].to_dict("records"))
    for method in ("to_dicts", "to_pylist"):
        if hasattr(frame, method):
            return iter(getattr(frame, method)())
    return iter(frame)  # a dataset yields dicts
