"""Each process of the unit tier builds a tree of commands once, as a process of a user does: it takes long."""

from __future__ import annotations

from functools import cache

from typer import testing
from typer.main import get_command

testing._get_command = cache(get_command)  # type: ignore[attr-defined]
