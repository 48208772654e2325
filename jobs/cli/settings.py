"""`basic settings`: every BASIC_* variable with its default and meaning, from the settings classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from jobs.cli.render import make_console, reference_table
from jobs.settings import settings_classes

_GROUPS: Final = {"storage": "All processes", "jobs": "Clients, API server and queue", "worker": "Workers"}

_MARKDOWN_HEAD: Final = """\
# Settings

bASIC reads its settings from environment variables. `basic settings` prints those of the installed version. A setting
can also be a file in `/run/secrets`, named like the variable in lower case; the environment variable takes precedence.
A variable that begins with `BASIC_` and is not listed here is an error, so that a typo is not ignored.

This page is generated: `basic settings --markdown > docs/settings.md`.
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One environment variable."""

    group: str  # the processes that read it
    variable: str
    default: str
    meaning: str


def settings(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown: the page docs/settings.md.")] = False,
) -> None:
    """Print every BASIC_* variable with its default and meaning.

    Example: basic settings
    """
    found = known_settings(settings_classes())
    if markdown:
        typer.echo(markdown_page(found), nl=False)
    else:
        rows = ((item.variable, item.default, item.meaning) for item in found)
        make_console().print(reference_table(("variable", "default", "meaning"), rows))


def known_settings(classes: dict[str, type[BaseSettings]]) -> list[Setting]:
    """Return the settings of the classes, base classes first and no variable twice."""
    found: dict[str, Setting] = {}
    for name, settings_class in sorted(classes.items(), key=lambda item: len(item[1].__mro__)):
        for field_name, field in settings_class.model_fields.items():
            variable = f"BASIC_{field_name.upper()}"
            found.setdefault(variable, Setting(_GROUPS.get(name, name), variable, _default(field), _meaning(field)))
    return list(found.values())


def markdown_page(settings: Sequence[Setting]) -> str:
    """Return the page docs/settings.md."""
    return _MARKDOWN_HEAD + "".join(_markdown_lines(settings))


def _markdown_lines(settings: Sequence[Setting]) -> Iterator[str]:
    group = ""
    for item in settings:
        if item.group != group:
            group = item.group
            yield f"\n## {group}\n\n| variable | default | meaning |\n|---|---|---|\n"
        meaning = item.meaning.replace("|", "\\|")
        yield f"| `{item.variable}` | {item.default} | {meaning} |\n"


def _default(field: FieldInfo) -> str:
    """Return the default: of one that depends on the machine the rule, of others the value."""
    extra: Any = field.json_schema_extra
    if isinstance(extra, dict) and "default_rule" in extra:
        return str(extra["default_rule"])
    value = field.default
    if isinstance(value, str):
        return value or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _meaning(field: FieldInfo) -> str:
    meaning = field.description or ""
    if get_origin(field.annotation) is Literal:
        values = (str(value) or "empty" for value in get_args(field.annotation))
        meaning += f" One of: {', '.join(values)}."
    return meaning
