"""bASIC without the models: messages, submission, queue, API server, client and command line. Imports no torch.

The names below are imported when they are first used, so that `import jobs` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.client import AsyncClient, Client, Columns, DataFile

    __version__: str

__all__ = ["AsyncClient", "Client", "Columns", "DataFile", "__version__"]

_OF_CLIENT = ("AsyncClient", "Client", "Columns", "DataFile")


def __getattr__(name: str) -> Any:
    if name in (*_OF_CLIENT, "client"):
        client = import_module("jobs.client")
        return client if name == "client" else getattr(client, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("basic-batch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
