"""bASIC under a name of its own, for projects that have modules called `jobs` or `storage` themselves."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from jobs import AsyncClient, Client, Columns, DataFile, errors

if TYPE_CHECKING:
    from jobs.producer import push

__all__ = ["AsyncClient", "Client", "Columns", "DataFile", "__version__", "errors", "push"]

__version__ = version("basic-batch")


def __getattr__(name: str) -> Any:
    """Import `push` when it is used: producers need the extra `api`, clients do not."""
    if name != "push":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from jobs.producer import push
    except ModuleNotFoundError as missing:
        raise ImportError(f"push needs {missing.name}; run: pip install 'basic-batch[api]'") from missing
    return push
