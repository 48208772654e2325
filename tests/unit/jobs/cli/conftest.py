from __future__ import annotations

from functools import cache

import pytest
from typer import testing
from typer.main import get_command

_command = cache(get_command)


@pytest.fixture(autouse=True)
def _commands_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the tree of commands once, as a process does: it takes longer than most of them."""
    monkeypatch.setattr(testing, "_get_command", _command)
