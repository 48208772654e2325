"""Templates of prompts: a text with {column} in it, or a file of Jinja."""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Final

from jobs.errors import InvalidValue
from jobs.tables.cells import is_missing
from jobs.tables.packages import load
from jobs.tables.readers import Row

JINJA_SUFFIXES: Final = (".jinja", ".jinja2", ".j2")

Render = Callable[[Row], str | None]  # the prompt of a row; None if a cell that it needs is missing


class Template:
    """A prompt with the values of a row filled in."""

    def __init__(self, columns: Collection[str], render: Render) -> None:
        self.columns = columns
        self.render = render


def read_template(template: str) -> Template:
    """Return a template from its text, or from the file that a name with a suffix of Jinja names."""
    if not template.endswith(JINJA_SUFFIXES):
        return _braces(template)
    try:
        return _jinja(Path(template).read_text(encoding="utf-8"), template)
    except OSError as exc:
        raise InvalidValue(f"The template {template} can't be read: {exc.strerror}.") from exc


def _braces(template: str) -> Template:
    """Return a template in which {column} stands for a cell, and {{ and }} for braces."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise InvalidValue(f"The template {template!r} is invalid: {exc}. Write {{{{ for a brace.") from exc
    columns = [name for _, name, _, _ in parts if name is not None]
    if not columns:
        raise InvalidValue(f"The template {template!r} names no column; write {{text}} for the column text.")
    if "" in columns or any(form or conversion for _, _, form, conversion in parts):
        raise InvalidValue(f"The template {template!r} has braces without a plain column name; write {{{{ for a brace.")

    def render(row: Row) -> str | None:
        if any(is_missing(row.get(column)) for column in columns):
            return None
        return "".join(text + ("" if column is None else str(row[column])) for text, column, _, _ in parts)

    return Template(columns, render)


def _jinja(source: str, name: str) -> Template:
    """Return a template of Jinja, which can neither change the values nor reach Python's inner attributes."""
    jinja2, sandbox = load("jinja2", "Templates of Jinja"), load("jinja2.sandbox", "Templates of Jinja")
    environment = sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        columns = sorted(load("jinja2.meta", "Templates").find_undeclared_variables(environment.parse(source)))
        template = environment.from_string(source)
    except jinja2.TemplateError as exc:
        raise InvalidValue(f"The template {name}, line {getattr(exc, 'lineno', 1)}: {exc}") from exc

    def render(row: Row) -> str | None:
        values = {column: None if is_missing(row.get(column)) else row[column] for column in columns}
        try:
            return str(template.render(values))
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, MemoryError) as exc:
            raise InvalidValue(f"The template {name} fails: {exc}") from exc

    return Template(columns, render)


def missing_columns(wanted: Iterable[str], columns: Collection[str]) -> list[str]:
    """Return the wanted columns that a table lacks."""
    return [name for name in wanted if name not in columns]
