"""Commands that need optional packages: if one is missing, name the extra of `basic-batch` that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint

import typer

from jobs.errors import SetupError

# The commands of `worker.cli`, for an installation that can't import it.
_WORKER_COMMANDS = ("worker", "generate", "bench", "plan", "models", "draft")
_EXTRAS = {
    "cryptography": "proof",
    "matplotlib": "plot",
    "pandas": "pandas",
    "psycopg": "postgres",
}  # import name -> extra
_OWN_PACKAGES = ("jobs", "storage", "worker", "migrations")


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a missing package into an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise not_installed(extra, exc) from exc


def not_installed(extra: str, missing: ModuleNotFoundError) -> SetupError:
    """Return the error for a missing package."""
    return SetupError(f"This command needs {missing.name}; install it with: pip install 'basic-batch[{extra}]'")


def extra_of(command: list[str], missing: ModuleNotFoundError) -> str:
    """Return the extra that brings the missing package of a command."""
    by_command = "worker" if set(command) & {*_WORKER_COMMANDS, "up"} else "api"
    return _EXTRAS.get((missing.name or "").partition(".")[0], by_command)


def is_own_module(missing: ModuleNotFoundError) -> bool:
    """Return whether a module of bASIC itself is missing: a bug, not a missing extra."""
    return (missing.name or "").partition(".")[0] in _OWN_PACKAGES


def add_placeholders(app: typer.Typer, entry: EntryPoint, missing: ModuleNotFoundError) -> None:
    """Add commands that only say which extra to install, in place of a package that can't be imported."""

    def explain() -> None:
        raise not_installed(entry.name, missing)

    for name in _WORKER_COMMANDS:
        options = {"ignore_unknown_options": True, "allow_extra_args": True}
        app.command(name, hidden=True, context_settings=options)(explain)
