"""Import the packages of the extra `data` when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jobs.errors import SetupError


def load(module: str, what: str) -> Any:
    """Return a module; raise SetupError, with what needs it and the command that installs it, if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as exc:
        package = module.partition(".")[0]
        raise SetupError(f"{what} need {package}; install it with: pip install 'basic-batch[data]'") from exc
