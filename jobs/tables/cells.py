"""Values of cells: missing ones, and those that JSON can't write as they are."""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any


def is_missing(value: Any) -> bool:
    """Return whether a cell is missing: None, NaN, or the NA value of pandas."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value


def python_value(value: Any) -> Any:
    """Return a value that JSON can't write as one that it can; raise TypeError for other values.

    Arrays become lists, dates ISO 8601, decimals numbers.
    """
    if hasattr(value, "tolist"):  # numpy
        return value.tolist()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, uuid.UUID | datetime.timedelta):
        return str(value)
    raise TypeError(f"it holds a value of type {type(value).__name__}")
