"""Command lines of `basic`, parsed as the command parses them, and not run."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cache
from typing import Any

import typer

from jobs.cli.app import app as own_commands
from jobs.cli.app import plug_in_commands


@cache
def _commands() -> Any:
    """Return all commands, those of the worker too."""
    app = copy(own_commands)
    app.registered_groups = [*own_commands.registered_groups]
    plug_in_commands(app)
    return typer.main.get_command(app)


def parse(arguments: Sequence[str]) -> str:
    """Return the path of the command that `basic ARGUMENTS` runs; raise a usage error if it can't be parsed."""
    command, path, left = _commands(), "basic", list(arguments)
    while hasattr(command, "resolve_command"):
        context = command.make_context(path, left)
        name, command, left = command.resolve_command(context, [*context._protected_args, *context.args])
        path = f"{path} {name}"
    command.make_context(path, left)
    return path
