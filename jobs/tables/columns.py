"""Turn the rows of a table into requests: which columns hold the prompt, the id, parameters, and values to keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from jobs.errors import InvalidValue
from jobs.tables.cells import is_missing, python_value
from jobs.tables.readers import Row
from jobs.tables.templates import Template, missing_columns, read_template

Request = dict[str, Any]

_PROMPTS: Final = ("prompt", "messages", "body")  # a request has one of them
_IDS: Final = ("custom_id", "id")
_OWN: Final = (*_PROMPTS, *_IDS, "keep", "model", "timeout_s", "method", "url")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table make its requests. At most one of `prompt`, `messages` and `template` is given.

    Without any, the table has requests: the columns prompt or messages, custom_id, and parameters such as max_tokens.
    """

    prompt: str | None = None  # a column of texts
    messages: str | None = None  # a column of lists of messages, or of such lists as JSON
    template: str | None = None  # a text with {column}, or the name of a file of Jinja
    id: str | None = None
    keep: Sequence[str] = ()  # columns that the outputs return

    @property
    def given(self) -> bool:
        """True if any column is named."""
        return self != Columns()

    def reader(
        self, columns: Collection[str] | None, parameters: Collection[str], name: str
    ) -> Callable[[Row], Request]:
        """Return the function from a row to its request, for a table with these columns (None: each row has its own).

        `parameters` are the names of request parameters. Raise InvalidValue if the table `name` lacks a column.
        """
        if sum(one is not None for one in (self.prompt, self.messages, self.template)) > 1:
            raise InvalidValue("Give one of prompt column, messages column and template, not several.")
        template = None if self.template is None else read_template(self.template)
        if columns is not None:
            self._check(columns, template, parameters, name)
        if template is not None:
            prompt = partial(_from_template, template)
        elif self.messages is not None:
            prompt = partial(_messages, self.messages)
        elif self.prompt is not None:
            prompt = partial(_text, self.prompt)
        else:
            prompt = partial(_own_fields, frozenset({*_OWN, *parameters}), frozenset(self.keep))
        return lambda row: self._request(row, prompt)

    def _check(
        self, columns: Collection[str], template: Template | None, parameters: Collection[str], name: str
    ) -> None:
        wanted = [column for column in (self.prompt, self.messages, self.id, *self.keep) if column is not None]
        lacking = missing_columns([*wanted, *(template.columns if template else ())], columns)
        if lacking:
            raise InvalidValue(f"{name} has no column {lacking[0]!r}, but {', '.join(columns) or 'none'}.")
        if (self.prompt, self.messages, self.template) != (None, None, None):
            return
        if not set(_PROMPTS) & set(columns):
            raise InvalidValue(
                f"{name} has no column prompt or messages, but {', '.join(columns) or 'none'}. "
                "Name the one with the prompts (Columns(prompt=…), --prompt-column), or give a template."
            )
        known = {*_OWN, *parameters, *self.keep, self.id}
        if unknown := [column for column in columns if column not in known]:
            raise InvalidValue(
                f"{name}: the column {unknown[0]!r} is no parameter of a request. Let the outputs return it "
                f"(Columns(keep=…), --keep {unknown[0]}), or name the column of the prompts; others are left out then."
            )

    def _request(self, row: Row, prompt: Callable[[Row], Request]) -> Request:
        request = prompt(row)
        names = (self.id,) if self.id is not None else _IDS
        for name in names:
            if not is_missing(row.get(name)):
                request["custom_id"] = str(_whole(row[name]))
                break
        kept = {name: row[name] for name in self.keep if not is_missing(row.get(name))}
        return {**request, "keep": kept} if kept else request


def requests_of(rows: Iterable[Row], read: Callable[[Row], Request], name: str) -> Iterator[bytes]:
    """Yield the requests of rows as JSON lines; raise InvalidValue with the number of a row that can't be written."""
    for number, row in enumerate(rows, 1):
        try:
            line = json.dumps(read(row), ensure_ascii=False, allow_nan=False, default=python_value)
            yield line.encode() + b"\n"
        except InvalidValue as refused:
            raise InvalidValue(f"{name}, row {number}: {refused.message}") from refused
        except UnicodeEncodeError as exc:
            raise InvalidValue(f"{name}, row {number} has an unpaired surrogate, which is not valid Unicode.") from exc
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidValue(f"{name}, row {number} can't be written as JSON: {exc}.") from exc


def _text(column: str, row: Row) -> Request:
    value = row.get(column)
    return {} if is_missing(value) else {"prompt": value if isinstance(value, str) else str(_whole(value))}


def _messages(column: str, row: Row) -> Request:
    value = row.get(column)
    return {} if is_missing(value) else {"messages": _json(value, column)}


def _from_template(template: Template, row: Row) -> Request:
    text = template.render(row)
    return {} if text is None else {"prompt": text}


def _own_fields(known: frozenset[str], kept: frozenset[str], row: Row) -> Request:
    """Return the fields of a row that is a request itself. Texts of a CSV file are read as JSON where they must be."""
    return {
        name: _value(name, value)
        for name, value in row.items()
        if not is_missing(value) and name not in _IDS and (name in known or name not in kept)
    }


def _value(name: str, value: Any) -> Any:
    if name in ("prompt", "method", "url", "model") or not isinstance(value, str):
        return _whole(value)
    if name in ("messages", "body", "keep"):
        return _json(value, name)
    try:
        return json.loads(value)  # a parameter: 0.5, true, ["a"]; else a text, such as stop
    except (ValueError, RecursionError):
        return value


def _json(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise InvalidValue(f"The cell of column {column!r} is not JSON ({exc}).") from exc


def _whole(value: Any) -> Any:
    """Return a whole number as an integer: pandas stores integers as floats if a cell is missing."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
