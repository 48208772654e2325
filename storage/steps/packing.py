"""Steps as rows of `packed_steps`: a row holds up to 128 steps of one choice, each column as one text.

A column of whole numbers is its minimum, `min_…`, and a text with one character per step: the code point 32 + x stands
for the minimum + x. NULL in place of the text: the same in all steps. So most values take one byte and the others two,
and plain SQL reads them: `unicode(substr(…))` in SQLite, `ascii(substr(…))` in PostgreSQL (storage.steps.view).

An optional column has 0 for none and 1 + x for the minimum + x; a minimum of NULL: none in all steps. `drafter`,
`decision` and `reached` number the elements of a JSON list beside them.

A row has about 1,300 bytes: three fill a page of SQLite, six one of PostgreSQL, which would move columns of rows over
2,000 bytes elsewhere.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import Any, Final

from storage.steps.columns import COLUMNS, StepColumns

OFFSET: Final = 32  # code point of 0: from here on characters are printable
MAX_OFFSET: Final = 0xD800 - OFFSET - 2  # below the surrogates, which are no characters
MAX_STEPS: Final = 128  # of a row
NUMBERED: Final = {"drafter": "drafters", "decision": "decisions", "reached": "reached_lists"}  # text: list
OPTIONAL: Final = ("expected_accepted", "plain_step_ms")
WITH_MINIMUM: Final = tuple(name for name in COLUMNS if name not in NUMBERED)

_DATA_BYTES: Final = 1_100  # of a row: without ids, minimums and headers
_SAMPLE_STEPS: Final = 64  # by which the size of a row is estimated


def packed_rows(key: Mapping[str, Any], worker_id: str, steps: StepColumns, first_step: int) -> list[dict[str, Any]]:
    """Return the rows of steps that one worker made; `key` names the choice, `first_step` numbers the first of them."""
    try:
        rows = list(_rows(steps))
    except _TooWide:
        rows = [row for first, last in pairwise(_cuts(steps)) for row in _rows(steps.part(first, last))]
    for row in rows:
        row |= {**key, "worker_id": worker_id, "first_step": first_step}
        first_step += row["steps"]
    return rows


class _TooWide(Exception):
    """The values of a column differ by more than MAX_OFFSET."""


Packed = tuple[int | None, str | None]  # minimum and text of a column


def pack(values: Sequence[int]) -> Packed:
    """Return a column of numbers."""
    low, high = min(values), max(values)
    if low == high:
        return low, None
    if high - low > MAX_OFFSET:
        raise _TooWide
    shift = OFFSET - low
    return low, _text([value + shift for value in values])


def pack_optional(values: Sequence[int | None]) -> Packed:
    """Return a column of numbers that may be missing."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    low, high = min(known), max(known)
    if low == high and len(known) == len(values):
        return low, None
    if high - low > MAX_OFFSET:
        raise _TooWide
    shift = OFFSET + 1 - low
    return low, _text([OFFSET if value is None else value + shift for value in values])


def unpack(low: int, text: str | None, steps: int) -> list[int]:
    """Return a column of `pack`."""
    if text is None:
        return [low] * steps
    low -= OFFSET
    return [low + ord(character) for character in text]


def unpack_optional(low: int | None, text: str | None, steps: int) -> list[int | None]:
    """Return a column of `pack_optional`."""
    if low is None or text is None:
        return [low] * steps
    low -= OFFSET + 1
    return [low + ord(character) if ord(character) > OFFSET else None for character in text]


def _packed(name: str, values: Sequence[Any]) -> Packed:
    return pack_optional(values) if name in OPTIONAL else pack(values)


def _text(code_points: Sequence[int]) -> str:
    return array("I", code_points).tobytes().decode("utf-32")


def _rows(steps: StepColumns) -> Iterator[dict[str, Any]]:
    """Yield rows of about equal length, without their keys; raise _TooWide."""
    columns = {name: _packed(name, getattr(steps, name)) for name in WITH_MINIMUM if name != "ended_ms"}
    rows = ceil(len(steps) / _steps_of_row(steps, columns))
    for first, last in pairwise(len(steps) * row // rows for row in range(rows + 1)):
        row: dict[str, Any] = {"steps": last - first}
        row["min_ended_ms"], row["ended_ms"] = pack(steps.ended_ms[first:last])
        for name, (low, text) in columns.items():
            row[f"min_{name}"], row[name] = low, None if text is None else text[first:last]
        for name, listed in NUMBERED.items():
            row[listed], row[name] = _numbered(getattr(steps, name)[first:last])
        yield row


def _numbered(values: Sequence[str | None]) -> tuple[str | None, str | None]:
    """Return the different values as a JSON list, and the text of their numbers."""
    numbers = dict(zip(dict.fromkeys(values), _DIGITS, strict=False))
    if len(numbers) > 1:
        return _to_json(list(numbers)), "".join(map(numbers.__getitem__, values))
    return None if values[0] is None else _to_json(values[:1]), None


_DIGITS: Final = [chr(OFFSET + number) for number in range(MAX_STEPS)]
_to_json: Final = json.JSONEncoder(separators=(",", ":")).encode


def _steps_of_row(steps: StepColumns, columns: Mapping[str, Packed]) -> int:
    """Return how many steps fit into a row, by a sample."""
    sample = slice(_SAMPLE_STEPS)
    steps_of_sample = len(steps.ended_ms[sample])
    size = 2 * steps_of_sample + sum(len(text[sample].encode()) for _, text in columns.values() if text)
    for name in NUMBERED:
        texts = set(getattr(steps, name)[sample])
        if len(texts) > 1:
            size += steps_of_sample + sum(len(text or "null") + 3 for text in texts)
    return max(1, min(MAX_STEPS, _DATA_BYTES * steps_of_sample // size))


def _cuts(steps: StepColumns) -> list[int]:
    """Return where to cut, so that no column's range exceeds MAX_OFFSET: mostly before and behind a long prefill."""
    cuts = {0, len(steps)}
    for name in WITH_MINIMUM:
        low = high = None
        for position, value in enumerate(getattr(steps, name)):
            if position in cuts:
                low = high = None
            if value is None:
                continue
            low, high = (value, value) if low is None else (min(low, value), max(high, value))
            if high - low > MAX_OFFSET:
                cuts.add(position)
                low = high = value
    return sorted(cuts)
